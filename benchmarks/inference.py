"""Measures what SE blocks cost a deployed network, in PyTorch, in onnxruntime and in OpenVINO.

    OMP_NUM_THREADS=1 python benchmarks/inference.py [--networks resnet50] [--json FILE]

The arms are the base, timm's own SE network (``seresnet50`` for ``resnet50``), the base with
``inject_se``, and each of these three after ``optimize_for_inference``, which folds their norms. An
optimised network is compared with the optimised base, so that no network gains only by having its
norms folded. onnxruntime and OpenVINO, if they are installed, fold the norms themselves. They run
the ONNX files of the base, of timm's network, of ours, and of ours after
``optimize_for_inference``. Our gates have random weights, because constant gates would be folded
away.

All networks are in one process and take turns on one CPU thread. Seconds are processor time. In
eager mode they take turns block by block: every network runs its stem, then every network runs its
first block, and so on. A machine that others use gets slower and faster within a second, and that
would change a whole step by more than SE blocks cost. The speed of a network also depends on where
its memory lies, so the networks are built anew for each of ``--restarts``. The sessions of the
other runtimes take turns by whole steps, and by groups of steps at small batches.

An overhead is the median over the rounds of t(arm) / t(its base) - 1 within one round, with
quartiles. ``gain`` is t(ours, optimised) / t(ours).
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

Step = Callable[..., Any]
RUNTIMES = {"eager": "torch", "onnxruntime": "onnxruntime", "openvino": "openvino"}


def open_injected(network: str) -> nn.Module:
    model = injected(network)
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_(0, 0.1)
    return model


@dataclass(frozen=True)
class Arm:
    """A network, the arm that its overhead is relative to, and timm's arm to compare it with."""

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
# A runtime that folds norms itself needs only one base.
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


def pieces(model: nn.Module) -> list[Step]:
    """The forward of a ResNet of timm as functions that run one after the other."""

    def stem(x: Tensor) -> Tensor:
        return model.maxpool(model.act1(model.bn1(model.conv1(x))))

    blocks = (block for i in range(1, 5) for block in model.get_submodule(f"layer{i}"))
    return [stem, *blocks, model.forward_head]


def eager_networks(network: str, side: int, layout: str, images: Tensor) -> dict[str, list[Step]]:
    """The pieces of each arm's network.

    Raises:
        ValueError: the pieces of a network do not make up its forward.
    """
    networks = {}
    for name, arm in ARMS.items():
        model = make(arm, network, side).to(memory_format=LAYOUTS[layout])
        with torch.inference_mode():
            x = images
            for piece in pieces(model):
                x = piece(x)
            if not torch.equal(x, model(images)):
                raise ValueError(f"{network} is no ResNet of timm: measure resnet50, say")
        networks[name] = pieces(model)
    return networks


def write_files(network: str, side: int, folder: Path) -> dict[str, Path]:
    """Write an ONNX file for each arm, which takes batches of any size."""
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
    """The processor time of one step of each arm, in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in rotated(list(steps), turn):
            start = time.process_time()
            for _ in range(group):
                steps[name]()
            if turn:  # the first round is a warm-up
                seconds[name].append((time.process_time() - start) / group)
    return seconds


def seconds_by_pieces(
    networks: dict[str, list[Step]], images: Tensor, rounds: int
) -> dict[str, list[float]]:
    """The processor time of one forward of each arm, in every round. They take turns by pieces."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 1):
        maps, total = dict.fromkeys(networks, images), dict.fromkeys(networks, 0.0)
        for i in range(len(networks["base"])):
            for name in rotated(list(networks), turn + i):
                start = time.process_time()
                with torch.inference_mode():
                    output = networks[name][i](maps[name])
                total[name] += time.process_time() - start
                maps[name] = output
        if turn:  # the first round is a warm-up
            for name in networks:
                seconds[name].append(total[name])
    return seconds


def rotated(names: list[str], turn: int) -> list[str]:
    """The names in another order for each turn, so that another one comes first."""
    k = turn % len(names)
    return names[k:] + names[:k]


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
    """Each setting as (network, batch, layout, runtime). ONNX files have only one layout."""
    for network, runtime in itertools.product(options.networks, options.runtimes):
        layouts = options.layouts if runtime == "eager" else ["nchw"]
        for batch, layout in itertools.product(options.batch_sizes, layouts):
            yield network, batch, layout, runtime


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all settings, in a process that was started with :data:`overhead.KEEP_MEMORY`."""
    torch.set_num_threads(1)
    results, files = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for network, batch, layout, runtime in settings(options):
            images = torch.randn(batch, 3, options.side, options.side)
            if runtime == "eager":
                images = images.contiguous(memory_format=LAYOUTS[layout])
                arms, runs = ARMS, []
                for _ in range(options.restarts):
                    networks = eager_networks(network, options.side, layout, images)
                    runs.append(seconds_by_pieces(networks, images, options.rounds))
                seconds = {name: [s for run in runs for s in run[name]] for name in arms}
            else:
                if network not in files:
                    files[network] = write_files(network, options.side, Path(folder))
                step = onnxruntime_step if runtime == "onnxruntime" else openvino_step
                arms = FILES
                steps = {name: step(path, images) for name, path in files[network].items()}
                rounds = options.restarts * options.rounds
                seconds = seconds_in_turns(steps, rounds, max(1, 4 // batch))
            rows = summarise(seconds, arms)
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
    parser.add_argument("--side", type=int, default=224, help="side of the images (default 224)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each arm (default 7)")
    parser.add_argument(
        "--restarts", type=int, default=3, help="builds of each network (default 3)"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds * options.restarts < 2:
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
            "restarts": options.restarts,
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
