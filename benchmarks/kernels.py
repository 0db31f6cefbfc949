"""Measures the kernels of SE blocks beside PyTorch's operations for the same, on CUDA.

    python benchmarks/kernels.py [--batch-sizes 256 32] [--json FILE]

The maps are those of resnet50 at 224 px, in bfloat16 and channels last. Each time is the median of
many runs (``triton.testing.do_bench``, which empties the cache between them), and the bandwidth
counts each map that must be read or written once.
"""

import argparse
import json
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.testing import do_bench

from se_inject import SqueezeExcite
from se_inject.layers import kernels

STAGES = ((256, 56, 16), (512, 28, 32), (1024, 14, 64), (2048, 7, 128))  # channels, side, width


def cases(batch: int, channels: int, side: int, width: int) -> dict[str, tuple[int, Any]]:
    """For each name, the maps that it must move, and what computes it."""

    def map_() -> Tensor:
        x = torch.randn(batch, channels, side, side, device="cuda", dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    x, residual, out = map_(), map_(), map_()
    gate, shift = torch.rand(2, batch, channels, 1, 1, device="cuda").unbind()
    narrow, narrow_shift = gate.bfloat16(), shift.bfloat16()
    se = SqueezeExcite(channels, width, device="cuda", init="paper").requires_grad_(False)
    layers = se.fc1.weight, se.fc1.bias, se.fc2.weight, se.fc2.bias
    low = [p.flatten(1).bfloat16() if p.dim() > 1 else p.bfloat16() for p in layers]
    z = x.mean((2, 3), dtype=torch.float32)
    s, hidden = kernels.excite(z, *layers)
    sums = kernels.products(x, residual)

    def layers_of_torch() -> Tensor:
        h = torch.relu(F.linear(z.bfloat16(), low[0], low[1]))
        return F.linear(h, low[2], low[3]).sigmoid()

    return {
        "copy": (2, lambda: out.copy_(x)),
        "addition of the base": (3, lambda: out.add_(residual)),
        "mean": (1, lambda: x.mean((2, 3), keepdim=True)),
        "scale, by torch": (2, lambda: x * narrow),
        "scale, kernel": (2, lambda: kernels.scale(x, gate, 2.0, out=out)),
        "scale and add, by torch": (3, lambda: torch.addcmul(residual, x, narrow, out=out)),
        "scale and add, kernel": (3, lambda: kernels.scale(x, gate, 2.0, residual, out=out)),
        "scale and shift, by torch": (
            2,
            lambda: torch.addcmul(narrow_shift, x, narrow, out=out),
        ),
        "scale and shift, kernel": (2, lambda: kernels.scale(x, gate, 2.0, shift=shift, out=out)),
        "products, by torch": (2, lambda: (x * residual).sum_to_size(gate.shape)),
        "products, kernel": (2, lambda: kernels.products(x, residual)),
        "layers, by torch": (0, layers_of_torch),
        "layers, kernel": (0, lambda: kernels.excite(z, *layers)),
        "layers backward, kernel": (
            0,
            lambda: kernels.excite_backward(
                sums, s, hidden, se.fc1.weight, se.fc2.weight, 2.0, side * side
            ),
        ),
    }


def microseconds(run: Callable[[], Any]) -> float:
    return 1e3 * do_bench(run, warmup=15, rep=50, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[256, 32], metavar="N")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    rows = []
    for batch in options.batch_sizes:
        for channels, side, width in STAGES:
            found = cases(batch, channels, side, width)
            table = Table("", "µs", "GB/s", title=f"batch {batch}, {channels} x {side} x {side}")
            megabytes = 2 * batch * channels * side * side / 1e6
            for name, (maps, run) in found.items():
                time = microseconds(run)
                speed = maps * megabytes / time * 1e3
                table.add_row(name, f"{time:.1f}", f"{speed:.0f}" if maps else "")
                rows.append({"batch": batch, "channels": channels, "name": name, "us": time})
            Console().print(table)
    if options.json:
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        options.json.write_text(json.dumps({**environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
