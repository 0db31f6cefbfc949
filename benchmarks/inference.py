"""What SE blocks cost a deployed network: beside timm's, with folded norms, and in other runtimes.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--networks resnet50] [--json FILE]

Arms: the base, timm's own SE network (``seresnet50`` of ``resnet50``) and the base with
``inject_se``, and each of them through ``optimize_for_inference``, which folds the norms of all
three. What an optimised network costs is compared with the optimised base, so that nobody gains by
norms that the other has still. onnxruntime and OpenVINO, where they are installed, fold the norms
themselves; they run the ONNX files of base, timm's and ours, and of ours after
``optimize_for_inference``. The gates are open: those that are constant would be folded away.

All networks are in one process and take turns on one CPU thread; seconds are processor time. An
overhead is the median over the rounds of t(arm) / t(its base) - 1 within one round, with quartiles.
At batch 1 a turn is a group of steps. ``gain`` is t(ours, optimised) / t(ours).
"""

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from overhead import KEEP_MEMORY, LAYOUTS, base, injected, quartiles, timms_se
from torch import Tensor, nn

from se_inject import optimize_for_inference, se_parameters, set_plain_ops

Step = Callable[[], object]
RUNTIMES = {"eager": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}


def open_injected(network: str) -> nn.Module:
    model = injected(network)
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_(0, 0.1)
    return model


@dataclass(frozen=True)
class Arm:
    """A network, what its overhead is over, and timm's network that it is beside."""

    build: Callable[[str], nn.Module]
    optimize: bool = False
    over: str = "base"
    beside: str | None = None


ARMS = {
    "base": Arm(base),
    "timm": Arm(timms_se),
    "se_inject": Arm(open_injected, beside="timm"),
    "base, optimized": Arm(base, True, over="base, optimized"),
    "timm, optimized": Arm(timms_se, True, over="base, optimized"),
    "se_inject, optimized": Arm(
        open_injected, True, over="base, optimized", beside="timm, optimized"
    ),
}
# A runtime that folds norms itself has one base.
FILES = {
    **{name: ARMS[name] for name in ("base", "timm", "se_inject")},
    "se_inject, optimized": Arm(open_injected, True, beside="timm"),
}


def make(arm: Arm, network: str, side: int, *, plain: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = arm.build(network).eval()
    if plain and arm.build is open_injected:
        set_plain_ops(model)
    if arm.optimize:
        model = optimize_for_inference(model, example_input=torch.randn(2, 3, side, side))
    return model


# --- steps of the runtimes -----------------------------------------------------------------------


def eager_steps(network: str, batch: int, side: int, layout: str) -> dict[str, Step]:
    memory_format = LAYOUTS[layout]
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=memory_format)
    models = {n: make(a, network, side).to(memory_format=memory_format) for n, a in ARMS.items()}

    def infer(model: nn.Module) -> None:
        with torch.inference_mode():
            model(images)

    return {name: partial(infer, model) for name, model in models.items()}


def write_files(network: str, side: int, folder: Path) -> dict[str, Path]:
    """One ONNX file for each arm, for any batch."""
    paths = {}
    for name, arm in FILES.items():
        path = paths[name] = folder / f"{network}-{len(paths)}.onnx"
        images = torch.randn(2, 3, side, side)
        torch.onnx.export(
            make(arm, network, side, plain=True),
            (images,),
            path,
            dynamo=True,
            verbose=False,
            input_names=["input"],
            dynamic_shapes=({0: "batch"},),
        )
    return paths


def onnxruntime_step(path: Path, images: Tensor) -> Step:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"input": images.numpy()})


def openvino_step(path: Path, images: Tensor) -> Step:
    import openvino

    core = openvino.Core()
    network = core.read_model(path)
    network.reshape(list(images.shape))
    settings = {
        "INFERENCE_NUM_THREADS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    return partial(core.compile_model(network, "CPU", settings), [images.numpy()])


# --- measuring -----------------------------------------------------------------------------------


def seconds_in_turns(steps: dict[str, Step], rounds: int, group: int) -> dict[str, list[float]]:
    """Processor time of one step of each, in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + 1):
        k = turn % len(names)
        for name in names[k:] + names[:k]:  # none always comes after the same one
            start = time.process_time()
            for _ in range(group):
                steps[name]()
            if turn:  # the first is a warm-up
                seconds[name].append((time.process_time() - start) / group)
    return seconds


def summarise(seconds: dict[str, list[float]], arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, values in seconds.items():
        reference = seconds[arms[name].over]
        over = quartiles([t / b - 1 for t, b in zip(values, reference, strict=True)])
        rows[name] = {
            "ms_quartiles": [1e3 * q for q in quartiles(values)],
            "overhead_quartiles": over,
        }
        beside = arms[name].beside
        if beside is not None:
            theirs = rows[beside]["overhead_quartiles"]
            pairs = zip(values, seconds[beside], strict=True)
            rows[name]["seconds_to_timm_quartiles"] = quartiles([a / b for a, b in pairs])
            # Where timm's overhead is within the noise of 0, a ratio to it says nothing.
            rows[name]["overhead_to_timm"] = over[1] / theirs[1] if theirs[0] > 0 else None
    pairs = zip(seconds["se_inject, optimized"], seconds["se_inject"], strict=True)
    rows["se_inject, optimized"]["gain_quartiles"] = quartiles([a / b for a, b in pairs])
    return rows


def settings(options: argparse.Namespace) -> Iterator[tuple[str, int, str, str]]:
    """Network, batch, layout and runtime; files have one layout."""
    for network, runtime in itertools.product(options.networks, options.runtimes):
        layouts = options.layouts if runtime == "eager" else ["nchw"]
        for batch, layout in itertools.product(options.batch_sizes, layouts):
            yield network, batch, layout, runtime


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """In a process that was started with :data:`overhead.KEEP_MEMORY`."""
    torch.set_num_threads(1)
    results, files = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for network, batch, layout, runtime in settings(options):
            if runtime == "eager":
                arms, steps = ARMS, eager_steps(network, batch, options.side, layout)
            else:
                if network not in files:
                    files[network] = write_files(network, options.side, Path(folder))
                images = torch.randn(batch, 3, options.side, options.side)
                step = onnxruntime_step if runtime == "onnxruntime" else openvino_step
                arms = FILES
                steps = {name: step(path, images) for name, path in files[network].items()}
            group = max(1, 4 // batch)
            rows = summarise(seconds_in_turns(steps, options.rounds, group), arms)
            label = f"{network}, {runtime}, batch {batch}, {layout}"
            results.append({"setting": label, "arms": rows})
            print_table(label, rows)
    return results


def print_table(label: str, rows: dict[str, dict[str, Any]]) -> None:
    print(label)
    for name, row in rows.items():
        low, middle, high = (100 * q for q in row["overhead_quartiles"])
        line = f"  {name:22} {row['ms_quartiles'][1]:8.2f} ms"
        if not name.startswith("base"):
            line += f"  {middle:+6.1f} % ({low:+.1f} to {high:+.1f})"
        if row.get("overhead_to_timm") is not None:
            line += f"  {row['overhead_to_timm']:.2f} of timm's"
        if "gain_quartiles" in row:
            line += f"  gain {statistics.median(row['gain_quartiles']):.3f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet50", "resnet18"], metavar="NAME")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 1], metavar="N")
    parser.add_argument("--side", type=int, default=224, help="of the images (default 224)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm (default 7)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("quartiles take two rounds or more: --rounds 2")
    for runtime in list(options.runtimes):
        if importlib.util.find_spec(RUNTIMES[runtime]) is None:
            print(f"{runtime} is not installed and is left out", file=sys.stderr)
            options.runtimes.remove(runtime)
    os.environ.update({name: str(value) for name, value in KEEP_MEMORY.items()})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        results = pool.submit(measure, options).result()
    if options.json:
        environment = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": " ".join(["python benchmarks/inference.py", *sys.argv[1:]]),
            "device": f"{platform.machine()} CPU, one thread",
            "rounds": options.rounds,
            "python": platform.python_version(),
            "timm": timm.__version__,
            **{
                package: version(package)
                for r, package in RUNTIMES.items()
                if r in options.runtimes
            },
        }
        options.json.write_text(json.dumps({**environment, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
