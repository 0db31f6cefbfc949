"""Measures how long planning and injecting take, as ratios of runs side by side.

    OMP_NUM_THREADS=1 python benchmarks/surgery.py [--json FILE]

1. ``inject_se(resnet152)`` is compared with ``timm.create_model("resnet152")`` in one process,
   which holds one model at a time.
2. The whole process ``se-inject resnet50`` is compared with ``python -c "import torch, timm"``.
3. ``plan_se`` is timed on forwards with 16 to 256 residual additions, in seconds for 1,000 recorded
   operations. If planning is linear, this figure stays the same.

The two sides of a ratio take turns, so that a noisy machine disturbs both, and the median is taken
over the ratios pair by pair. Seconds are processor time of the process and of the processes that it
started. With one thread nothing waits, and other work on the machine counts less.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from se_inject import inject_se, plan_se

PROCESS_A = [sys.executable, "-m", "se_inject", "resnet50"]
PROCESS_B = [sys.executable, "-c", "import torch, timm"]


def processor_seconds() -> float:
    """The processor time of this process and of those that it has started."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def seconds(function: Callable[[], Any]) -> float:
    start = processor_seconds()
    function()
    return processor_seconds() - start


def compare(a: Callable[[], Any], b: Callable[[], Any], pairs: int) -> dict[str, float]:
    """The medians of a, of b and of a / b over interleaved runs, after one warm-up of each."""
    times = [(seconds(a), seconds(b)) for _ in range(pairs + 1)][1:]
    ratios = sorted(x / y for x, y in times)
    return {
        "a_s": statistics.median(x for x, _ in times),
        "b_s": statistics.median(y for _, y in times),
        "ratio": statistics.median(ratios),
        "ratio_min": ratios[0],
        "ratio_max": ratios[-1],
        "pairs": pairs,
    }


class AdditiveUNet(nn.Module):
    """Residual units on the way down, concatenated skips on the way up, all in one forward."""

    def __init__(self, depth: int) -> None:
        super().__init__()

        def unit(width: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.SiLU())

        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.ModuleList(unit(16) for _ in range(depth))
        self.up = nn.ModuleList(unit(32) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for unit in self.down:
            x = x + unit(x)
            skips.append(x)
        for unit in self.up:
            x = unit(torch.cat([x, skips.pop()], 1))
        return x


class Count(TorchFunctionMode):
    """Counts the torch functions that a forward calls."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def planning(depth: int, repeats: int = 5) -> dict[str, float]:
    """How long planning takes, in all and for 1,000 operations of the forward."""
    network, example = AdditiveUNet(depth), torch.empty(2, 3, 16, 16)
    with torch.no_grad(), Count() as count:
        network(example)
    times = sorted(seconds(lambda: plan_se(network, example_input=example)) for _ in range(repeats))
    return {
        "operations": count.calls,
        "seconds": times[repeats // 2],
        "seconds_per_1000": 1000 * times[repeats // 2] / count.calls,
    }


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--pairs", type=int, default=9, help="runs of each side (default 9)")
    options = parser.parse_args()

    built: list[nn.Module] = []  # only the model that was built last

    def create() -> None:
        built[:] = [timm.create_model("resnet152")]

    create()
    results = {
        "inject_se(resnet152) / timm.create_model('resnet152')": compare(
            lambda: inject_se(built[0]), create, options.pairs
        ),
        "se-inject resnet50 / python -c 'import torch, timm'": compare(
            lambda: run(PROCESS_A), lambda: run(PROCESS_B), options.pairs
        ),
    }
    for name, result in results.items():
        print(
            f"{name}: {result['ratio']:.2f} ({result['ratio_min']:.2f} to"
            f" {result['ratio_max']:.2f}; medians {result['a_s']:.2f} s / {result['b_s']:.2f} s)"
        )
    rows = {depth: planning(depth) for depth in (16, 16, 64, 256)}  # the first run is a warm-up
    for depth, row in rows.items():
        print(
            f"plan_se of {depth} additions in one forward: {row['seconds']:.2f} s for"
            f" {row['operations']} operations, {row['seconds_per_1000']:.2f} s a 1,000"
        )
    if options.json:
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": f"OMP_NUM_THREADS=1 python benchmarks/surgery.py --pairs {options.pairs}",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        options.json.write_text(
            json.dumps({**environment, "results": results, "planning": rows}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
