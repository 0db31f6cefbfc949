"""Measures what each way of computing an SE block costs in a ResNet-50, on one CPU thread.

    OMP_NUM_THREADS=1 python benchmarks/tricks.py [--rounds 12] [--json FILE]

The batch has 8 images. The time of a whole step varies by more than an SE block takes. So only the
calls of the SE blocks are timed, in the running network, where the caches hold what they hold in
practice. The variants take turns, and all times are processor time. In inference, the 16 calls of a
forward in ``inference_mode`` are timed. In training, the forward and backward of one SE block with
its addition are timed alone, on maps of ResNet-50's shapes, and multiplied by the number of its
blocks with such a map. Overheads are relative to the base's own addition.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from overhead import LAYOUTS, injected, quartiles
from torch import Tensor, nn

from se_inject import SqueezeExcite
from se_inject.layers.scale_add import scale_add
from se_inject.layers.squeeze_excite import bottleneck_width

BATCH = 8
MAPS = [(256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3)]  # channels, side, blocks
Variant = Callable[[SqueezeExcite, Tensor, Tensor], Tensor]
AS_IT_IS = SqueezeExcite.forward


def mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def sum_over_n(x: Tensor) -> Tensor:
    return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])


def flat_mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)[:, :, None, None]


def product(x: Tensor) -> Tensor:
    """The mean as a product with a vector, in the memory format of the map."""
    n, c, h, w = x.shape
    ones = x.new_full((h * w,), 1 / (h * w))
    if x.is_contiguous():
        return torch.mv(x.view(n * c, h * w), ones).view(n, c, 1, 1)
    rows = x.permute(0, 2, 3, 1).flatten(1, 2)
    return torch.bmm(ones.expand(n, 1, -1), rows).view(n, c, 1, 1)


def excite(se: SqueezeExcite, z: Tensor) -> Tensor:
    return se.fc2(torch.relu(se.fc1(z))).sigmoid() * se.gate_scale


def excite_linear(se: SqueezeExcite, z: Tensor) -> Tensor:
    """The layers as matrix products, without calling the modules and their hooks."""
    h = torch.relu(F.linear(z.flatten(1), se.fc1.weight.flatten(1), se.fc1.bias))
    s = F.linear(h, se.fc2.weight.flatten(1), se.fc2.bias).sigmoid() * se.gate_scale
    return s[:, :, None, None]


def before_last_convolution(se: Any, x: Tensor, r: Tensor) -> Tensor:
    """Squeeze the last convolution's input, then apply that convolution and its norm."""
    z = se.feed.conv3.forward(se.feed.hidden.mean((2, 3), keepdim=True))
    bn = se.feed.bn3
    z = F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    return torch.addcmul(r, x, excite(se, z), out=x)


def timms(se: SqueezeExcite, x: Tensor, r: Tensor) -> Tensor:
    s = se.fc2(torch.relu_(se.fc1(mean(x)))).sigmoid()
    return (x * s).add_(r)


INFERENCE: dict[str, Variant] = {
    "base": lambda se, x, r: x.add_(r),
    "timm: mean, x * s, add_": timms,
    "addcmul": lambda se, x, r: torch.addcmul(r, x, excite(se, mean(x))),
    "addcmul over x": lambda se, x, r: torch.addcmul(r, x, excite(se, mean(x)), out=x),
    "and sum / n (se_inject)": lambda se, x, r: AS_IT_IS(se, x, r, in_place=True),
    "and mean of flattened": lambda se, x, r: torch.addcmul(r, x, excite(se, flat_mean(x)), out=x),
    "and mean as a product": lambda se, x, r: torch.addcmul(r, x, excite(se, product(x)), out=x),
    "and linear layers": lambda se, x, r: torch.addcmul(
        r, x, excite_linear(se, sum_over_n(x)), out=x
    ),
    "and squeeze before last conv": before_last_convolution,
    "and no squeeze at all": lambda se, x, r: torch.addcmul(
        r, x, excite(se, x[..., :1, :1]), out=x
    ),
}
TRAINING: dict[str, Variant] = {
    "base": lambda se, x, r: x + r,
    "timm: mean, x * s, add_": timms,
    "addcmul": lambda se, x, r: torch.addcmul(r, x, excite(se, mean(x))),
    "sum / n, x * s, add_": lambda se, x, r: (x * excite(se, sum_over_n(x))).add_(r),
    "sum / n, addcmul": lambda se, x, r: torch.addcmul(r, x, excite(se, sum_over_n(x))),
    "sum / n, own backward (se_inject)": AS_IT_IS,
    "own backward, linear layers": lambda se, x, r: scale_add(
        r, x, excite_linear(se, sum_over_n(x))
    ),
}


def inference_seconds(layout: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of the SE calls in one forward. For the base they are those of its additions."""
    memory_format = LAYOUTS[layout]
    model = injected("resnet50").eval().to(memory_format=memory_format)
    images = torch.randn(BATCH, 3, 224, 224).contiguous(memory_format=memory_format)
    for block in model.modules():
        if isinstance(block, timm.models.resnet.Bottleneck):
            object.__setattr__(block.se, "feed", block)

            def keep(module: nn.Module, args: Any, block: Any = block) -> None:
                object.__setattr__(block, "hidden", args[0])

            block.conv3.register_forward_pre_hook(keep)
    spent = 0.0

    def timed(variant: Variant) -> Callable[..., Tensor]:
        def forward(self: SqueezeExcite, x: Tensor, residual: Tensor, in_place: bool) -> Tensor:
            nonlocal spent
            start = time.thread_time()
            out = variant(self, x, residual)
            spent += time.thread_time() - start
            return out

        return forward

    seconds: dict[str, list[float]] = {name: [] for name in INFERENCE}
    with torch.inference_mode():
        for turn in range(rounds + 1):
            for name in rotated(list(INFERENCE), turn):
                SqueezeExcite.forward = timed(INFERENCE[name])
                spent = 0.0
                model(images)
                seconds[name] += [spent] * (turn > 0)
    SqueezeExcite.forward = AS_IT_IS
    return seconds


def training_seconds(layout: str, rounds: int) -> dict[str, list[float]]:
    """The seconds of the forward and backward of all SE blocks with their additions."""
    totals = {name: [0.0] * rounds for name in TRAINING}
    for channels, side, blocks in MAPS:
        se = SqueezeExcite(channels, bottleneck_width(channels, 16))
        se.to(memory_format=LAYOUTS[layout])
        maps = torch.randn(3, BATCH, channels, side, side).unbind()
        x, r, g = (t.contiguous(memory_format=LAYOUTS[layout]) for t in maps)
        inputs = (x.requires_grad_(), r.requires_grad_(), *se.parameters())
        for turn in range(rounds + 1):
            for name in rotated(list(TRAINING), turn):
                g.mul_(1)  # writes the gradient just before, as a network does
                start = time.thread_time()
                out = TRAINING[name](se, x, r)
                torch.autograd.grad(out, inputs, g, allow_unused=True)
                if turn:
                    totals[name][turn - 1] += blocks * (time.thread_time() - start)
    return totals


def rotated(names: list[str], turn: int) -> list[str]:
    k = turn % len(names)
    return names[k:] + names[:k]


def summarise(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    base = statistics.median(seconds["base"])
    theirs = statistics.median(seconds["timm: mean, x * s, add_"]) - base
    return {
        name: {
            "ms_quartiles": [1e3 * q for q in quartiles(values)],
            "overhead_ms": 1e3 * (statistics.median(values) - base),
            "overhead_to_timm": (statistics.median(values) - base) / theirs,
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12, help="turns of each (default 12)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for mode, measure in (("inference", inference_seconds), ("training", training_seconds)):
        for layout in LAYOUTS:
            rows = summarise(measure(layout, options.rounds))
            results[f"{mode}, {layout}"] = rows
            print(f"resnet50, batch {BATCH}, {mode}, {layout}")
            for name, row in rows.items():
                print(
                    f"  {name:33} {row['ms_quartiles'][1]:7.1f} ms, {row['overhead_ms']:6.1f} over"
                    f" the base's addition: {row['overhead_to_timm']:.2f} of timm's",
                    flush=True,
                )
    if options.json:
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"OMP_NUM_THREADS=1 python benchmarks/tricks.py --rounds {options.rounds}",
            "device": "x86-64 CPU, one thread",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        options.json.write_text(json.dumps({**environment, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
