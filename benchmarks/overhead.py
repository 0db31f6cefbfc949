"""Measures what SE blocks cost in time and memory, as ratios of runs side by side.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--networks resnet50] [--compile] [--json FILE]
    python benchmarks/overhead.py --device cuda --batch-sizes 1 32 256 [--ways graphs] [--json FILE]

The arms are the base network, timm's own SE network (``seresnet50`` for ``resnet50``) and the base
with ``inject_se``. ``--compile`` adds our network with only its SE blocks compiled, and all three
networks through ``torch.compile``, whose overheads are relative to the compiled base. ``--ways``
chooses among these, ``graphs`` (compiled, and replayed as CUDA graphs) and ``optimized`` (after
``optimize_for_inference``, in inference only).

On a CPU each arm runs in a process of its own, so that none finds the memory that another left
behind. The processes take turns, so that a noisy machine disturbs them all. An overhead is the
median, over the rounds, of t(arm) / t(base) - 1 within one round, with its quartiles. If others use
the machine, they may add more to a step than SE blocks do. Then the fastest step of each arm tells
more, so the table also has the overhead by the fastest steps.

On a CPU, seconds are the processor time of the one thread, which other programs disturb least. The
allocator keeps its memory there, so that page faults do not count. On CUDA, the time is taken
between events around 5 to 20 steps after a warm-up, with bfloat16 autocast. A training step is
forward, cross-entropy, backward and SGD with momentum. Memory is the peak of what a step allocates,
without the weights and the input.

The floor of an SE block is the time that it takes to move what the block must move at least, at the
bandwidth that a plain copy reaches on the device. In inference this is one more read of its map. In
training the backward pass also reads the map once (for the gate's gradient), reads the gradient of
the output twice (before and after the gate's gradient is known) and writes the map's gradient.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from se_inject import SqueezeExcite, inject_se, optimize_for_inference, plan_se

LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}
MAPS_MOVED = {"inference": 1, "training": 5}
DEVICES = ["cpu", "cuda"]
# By default glibc gives freed memory back and takes it again page by page, in amounts that are
# chance. The 40,000 to 60,000 page faults in a step take more time than SE does. With these
# settings it keeps the memory, like the allocators that PyTorch's tuning guide advises.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": 2**25, "MALLOC_TRIM_THRESHOLD_": 2**40}
# Otherwise the profiler reports each start and each missing device between the tables.
QUIET = {"KINETO_LOG_LEVEL": 99}


def base(network: str) -> nn.Module:
    # By default timm starts the last norms at zero, which would make every branch map zero.
    return timm.create_model(network, zero_init_last=False)


def timms_se(network: str) -> nn.Module:
    return timm.create_model(f"se{network}", zero_init_last=False)


def injected(network: str) -> nn.Module:
    return inject_se(base(network))


def compiled(build: Callable[[str], nn.Module], network: str) -> Any:
    return torch.compile(build(network))


def graphed(build: Callable[[str], nn.Module], network: str) -> Any:
    """Compile, and replay the kernels as CUDA graphs, which take no launches from Python."""
    return torch.compile(build(network), mode="reduce-overhead")


def blocks_compiled(network: str) -> nn.Module:
    """Compile only the SE blocks, which then run as Triton kernels on CUDA. The rest is eager."""
    model = injected(network)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.compile(dynamic=False)  # no shape changes, as in the whole networks
    return model


def optimized(build: Callable[[str], nn.Module], network: str) -> nn.Module:
    """Fold the norms, and of ours take the squeeze early where that is possible."""
    model = build(network).eval()
    for module in model.modules():
        if isinstance(module, SqueezeExcite):  # Constant gates would be folded away too.
            nn.init.normal_(module.fc2.weight, 0, 0.1)
    return optimize_for_inference(model, example_input=torch.randn(2, 3, 224, 224))


@dataclass(frozen=True)
class Arm:
    """A network, the arm that its overhead is relative to and, for ours, timm's arm beside it."""

    build: Callable[[str], Any]
    over: str
    beside: str | None = None


ARMS = {
    "base": Arm(base, over="base"),
    "timm": Arm(timms_se, over="base"),
    "se_inject": Arm(injected, over="base", beside="timm"),
    "se_inject, blocks compiled": Arm(blocks_compiled, over="base", beside="timm"),
    "base, compiled": Arm(partial(compiled, base), over="base, compiled"),
    "timm, compiled": Arm(partial(compiled, timms_se), over="base, compiled"),
    "se_inject, compiled": Arm(
        partial(compiled, injected), over="base, compiled", beside="timm, compiled"
    ),
    "base, optimized": Arm(partial(optimized, base), over="base, optimized"),
    "timm, optimized": Arm(partial(optimized, timms_se), over="base, optimized"),
    "se_inject, optimized": Arm(
        partial(optimized, injected), over="base, optimized", beside="timm, optimized"
    ),
    "base, graphs": Arm(partial(graphed, base), over="base, graphs"),
    "timm, graphs": Arm(partial(graphed, timms_se), over="base, graphs"),
    "se_inject, graphs": Arm(
        partial(graphed, injected), over="base, graphs", beside="timm, graphs"
    ),
}
WAYS = {
    "eager": ("base", "timm", "se_inject"),
    "blocks": ("base", "timm", "se_inject, blocks compiled"),
    "compiled": ("base, compiled", "timm, compiled", "se_inject, compiled"),
    "optimized": ("base, optimized", "timm, optimized", "se_inject, optimized"),
    "graphs": ("base, graphs", "timm, graphs", "se_inject, graphs"),
}


@dataclass(frozen=True)
class Setting:
    """The setting in which all arms run side by side."""

    network: str
    mode: str  # "inference" or "training"
    batch: int
    layout: str
    device: str
    side: int = 224

    @property
    def steps(self) -> int:
        """The number of steps that are timed together in one turn.

        Short steps are timed in groups. The first step of a turn is slow, because other processes
        had the caches before it, and a turn of one step would consist only of such a step.
        """
        if self.device == "cuda":
            return max(5, min(20, 1280 // self.batch))
        return max(1, 8 // self.batch)

    @property
    def label(self) -> str:
        return f"{self.network}, {self.mode}, batch {self.batch}, {self.layout}"


# --- in the process of one arm -----------------------------------------------------------------


def make_step(arm: Arm, setting: Setting) -> Callable[[], None]:
    """Make a step: one forward or one training step of a new network on random images."""
    torch.manual_seed(0)
    memory_format = LAYOUTS[setting.layout]
    model = arm.build(setting.network).to(setting.device).to(memory_format=memory_format)
    images = torch.randn(setting.batch, 3, setting.side, setting.side, device=setting.device)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.randint(1000, (setting.batch,), device=setting.device)
    autocast = torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda")
    if setting.mode == "inference":
        model.eval()

        def infer() -> None:
            with torch.inference_mode(), autocast:
                model(images)

        return infer

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # at the end, so no step begins with old gradients in memory

    return train


def step_seconds(step: Callable[[], None], device: str, steps: int) -> float:
    """The time of one step: processor time on a CPU, or the time between events on CUDA."""
    if device == "cpu":
        start = time.process_time()
        for _ in range(steps):
            step()
        return (time.process_time() - start) / steps
    for _ in range(3):  # these steps take back the memory that other processes had meanwhile
        step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / steps


def peak_bytes(step: Callable[[], None], device: str) -> int:
    """The most bytes that a step has allocated at once, beyond those that were there before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    profiler = partial(
        torch.profiler.profile,
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # torch 2.11 warns otherwise; there is only one cycle
    )
    with profiler():  # the first profile of a process misses what happens while it starts
        pass
    with profiler() as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [e for e in events if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes))


def work(connection: Connection, arms: dict[str, Arm], setting: Setting) -> None:
    """Answer requests for the "time" or the "memory" of an arm, until one for "stop" comes."""
    # By default cuDNN chooses its algorithms by rule, the same ones for all arms.
    torch.backends.cudnn.benchmark = setting.device == "cpu"
    if setting.device == "cpu":
        torch.set_num_threads(1)  # with more, processor time would be their sum
    steps = {name: make_step(arm, setting) for name, arm in arms.items()}
    for step in steps.values():
        for _ in range(3):
            step()
    result: Any = "ready"
    while True:
        if setting.device == "cuda" and len(arms) == 1:
            torch.cuda.empty_cache()  # for the next process, because all share one device
        connection.send(result)
        name, what = connection.recv()
        if what == "stop":
            return
        if what == "time":
            result = step_seconds(steps[name], setting.device, setting.steps)
        else:
            result = peak_bytes(steps[name], setting.device)


# --- in the parent -----------------------------------------------------------------------------


def processes_of(arms: dict[str, Arm], setting: Setting) -> list[list[str]]:
    """Which arms run in one process.

    On CUDA, eager networks wait for Python, whose speed depends on the processor that a process
    happens to run on. So these share a process. The others are compiled at the same time.
    """
    if setting.device == "cpu":
        return [[name] for name in arms]
    whole = WAYS["compiled"] + WAYS["graphs"]
    alone = [[name] for name in arms if name in whole]
    together = [name for name in arms if name not in whole]
    return alone + ([together] if together else [])


def measure(arms: dict[str, Arm], setting: Setting, rounds: int) -> dict[str, dict[str, Any]]:
    """The seconds of every round and the peak bytes of every arm, from one set of processes."""
    cuda = setting.device == "cuda"
    # A server that has imported the libraries forks the processes for CUDA. On a CPU, each process
    # starts anew, with an allocator that nobody has used.
    context: Any = multiprocessing.get_context("forkserver" if cuda else "spawn")
    if cuda:
        context.set_forkserver_preload(["timm", "se_inject"])
    workers = {}
    processes = []
    for names in processes_of(arms, setting):
        connection, other = context.Pipe()
        chosen = {name: arms[name] for name in names}
        process = context.Process(target=work, args=(other, chosen, setting), daemon=True)
        process.start()
        other.close()
        processes.append((process, connection))
        workers.update(dict.fromkeys(names, connection))
        if not cuda:
            connection.recv()  # it is ready, and the next process may start
    if cuda:  # These compile for a minute, at the same time.
        for _, connection in processes:
            connection.recv()

    def ask(name: str, what: str) -> Any:
        workers[name].send((name, what))
        return workers[name].recv()

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in range(rounds):
        k = i % len(names)
        for name in names[k:] + names[:k]:  # another one begins each round
            seconds[name].append(ask(name, "time"))
    results = {n: {"seconds": seconds[n], "peak_bytes": ask(n, "memory")} for n in names}
    for process, connection in processes:
        connection.send((None, "stop"))
        process.join()
    return results


def measure_again(
    arms: dict[str, Arm], setting: Setting, rounds: int, restarts: int
) -> dict[str, dict[str, Any]]:
    """The rounds of several sets of processes, whose speed depends on where their memory lies."""
    runs = [measure(arms, setting, rounds) for _ in range(restarts)]
    return {
        name: {
            "seconds": [s for run in runs for s in run[name]["seconds"]],
            "peak_bytes": max(run[name]["peak_bytes"] for run in runs),
        }
        for name in arms
    }


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def summarise(measured: dict[str, dict[str, Any]], batch: int, floor: float) -> dict[str, Any]:
    """The medians, and the overheads over the base within each round."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        seconds = statistics.median(values["seconds"])
        reference = measured[ARMS[name].over]["seconds"]
        over = [t / b - 1 for t, b in zip(values["seconds"], reference, strict=True)]
        rows[name] = {
            "seconds": seconds,
            "seconds_min": min(values["seconds"]),
            "images_per_second": batch / seconds,
            "overhead_quartiles": quartiles(over),
            "overhead_of_fastest": min(values["seconds"]) / min(reference) - 1,
            "overhead_to_floor": statistics.median(over) * statistics.median(reference) / floor,
            "peak_bytes": values["peak_bytes"],
        }
    for name in rows:
        timms = ARMS[name].beside
        if timms is None:
            continue
        pairs = zip(measured[name]["seconds"], measured[timms]["seconds"], strict=True)
        rows[name]["seconds_to_timm_quartiles"] = quartiles([a / b for a, b in pairs])
        ours, theirs = (rows[n]["overhead_quartiles"] for n in (name, timms))
        # Where timm's overhead is within the noise of 0, a ratio to it says nothing.
        rows[name]["overhead_to_timm"] = ours[1] / theirs[1] if theirs[0] > 0 else None
        peak, theirs_peak = (rows[n]["peak_bytes"] for n in (name, timms))
        # A CUDA graph has its memory from the first step on, so that a step allocates nothing.
        rows[name]["peak_to_timm"] = peak / theirs_peak if theirs_peak else None
    return rows


def copy_bandwidth(device: str) -> float:
    """The bytes per second, read and written, of a plain copy that is too large for the caches."""
    source = torch.randn(2**26 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    times = [step_seconds(lambda: target.copy_(source), device, 5) for _ in range(9)]
    size = source.numel() * source.element_size()
    if device == "cuda":
        del source, target
        torch.cuda.empty_cache()
    return 2 * size / statistics.median(times[2:])


@cache
def squeezed_elements(network: str, side: int) -> int:
    """How many numbers the SE blocks of a network average for one image."""
    example = torch.empty(2, 3, side, side, device="meta")
    with torch.device("meta"):
        model = base(network)
    return plan_se(model, example_input=example).added.squeeze


def floor_seconds(setting: Setting, bandwidth: float) -> float:
    """The seconds that it takes to move the maps that SE must move, at this bandwidth."""
    elements = setting.batch * squeezed_elements(setting.network, setting.side)
    itemsize = 4 if setting.device == "cpu" else 2
    return MAPS_MOVED[setting.mode] * elements * itemsize / bandwidth


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    for network, mode, layout in itertools.product(
        options.networks, options.modes, options.layouts
    ):
        for batch in options.batch_sizes:
            if mode == "inference" or batch > 1:  # a batch of one is only for latency
                yield Setting(network, mode, batch, layout, options.device)


def print_table(result: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, title_justify="left")
    table.title = f"{result['setting']}; floor {result['floor_seconds'] * 1e3:.2f} ms"
    overheads = "over base (quartiles)", "fastest", "÷ timm's", "÷ floor"
    for header in ("arm", "ms", "images/s", *overheads, "peak MB"):
        table.add_column(header, justify="left" if header == "arm" else "right", no_wrap=True)
    for name, row in result["arms"].items():
        low, middle, high = (100 * q for q in row["overhead_quartiles"])
        over = (
            f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})",
            f"{100 * row['overhead_of_fastest']:+.1f} %",
            "" if row.get("overhead_to_timm") is None else f"{row['overhead_to_timm']:.2f}",
            f"{row['overhead_to_floor']:.1f}",
        )
        table.add_row(
            name,
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['images_per_second']:.1f}",
            *(("",) * len(over) if name.startswith("base") else over),
            f"{row['peak_bytes'] / 1e6:.0f}",
        )
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    four = ["resnet18", "resnet50", "resnext50_32x4d", "resnet152"]
    parser.add_argument("--networks", nargs="+", default=four, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=MAPS_MOVED, default=list(MAPS_MOVED))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["eager"], help="how the networks run"
    )
    parser.add_argument(
        "--compile", action="store_true", help="short for --ways eager blocks compiled"
    )
    parser.add_argument("--rounds", type=int, default=15, help="turns of each arm (default 15)")
    parser.add_argument("--restarts", type=int, default=1, help="sets of processes (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.rounds * options.restarts < 2:
        parser.error("quartiles take two rounds or more: --rounds 2")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    ways = ("eager", "blocks", "compiled") if options.compile else options.ways
    names = {name for way in ways for name in WAYS[way]}
    # The workers read these variables when they start.
    os.environ.update({name: str(value) for name, value in (KEEP_MEMORY | QUIET).items()})
    torch.set_num_threads(1)
    bandwidth = copy_bandwidth(options.device)
    results = []
    for setting in settings(options):
        arms = {
            name: arm
            for name, arm in ARMS.items()
            if name in names and (setting.mode == "inference" or "optimized" not in name)
        }
        if not arms:  # Optimized networks are not trained.
            continue
        floor = floor_seconds(setting, bandwidth)
        rows = summarise(
            measure_again(arms, setting, options.rounds, options.restarts), setting.batch, floor
        )
        results.append({"setting": setting.label, "floor_seconds": floor, "arms": rows})
        print_table(results[-1])
        if options.json:
            write(results, options, bandwidth)


def write(results: list[dict[str, Any]], options: argparse.Namespace, bandwidth: float) -> None:
    cuda = options.device == "cuda"
    processor = f"{platform.machine()} CPU, one thread"
    environment = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python benchmarks/overhead.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if cuda else processor,
        "copy_bandwidth_gb_per_s": bandwidth / 1e9,
        "rounds": options.rounds,
        "restarts": options.restarts,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    options.json.write_text(json.dumps({**environment, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
