"""Do SE blocks help? Trains the list of evidence_list.py and writes docs/evidence.md from it.

    python benchmarks/evidence.py                       # trains what is missing, on the CPU
    python benchmarks/evidence.py --device cuda         # trains on all images, in bf16
    python benchmarks/evidence.py --page                # writes docs/evidence.md and its picture
    python benchmarks/evidence.py --quick --output DIR  # trains a tiny version in seconds

Each run trains one arm with one seed, by the code of ``se-inject finetune``, and writes one JSON
file. A file that exists is not made again, so the list goes on where it was stopped.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from evidence_list import RATE_SEED, SCALES, Arm, Experiment

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))  # for fashion_mnist.py and lite0.py
RESULTS = ROOT / "benchmarks" / "results" / "evidence"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scale", choices=SCALES, help="default: small on a CPU, full on a GPU")
    parser.add_argument("--quick", action="store_true", help="the same as --scale quick")
    parser.add_argument(
        "--only", nargs="*", default=[""], help="train only what begins so: lite0-elpv/se ..."
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the files go")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--page", action="store_true", help="write docs/evidence.md, train nothing")
    options = parser.parse_args()
    if options.page:
        from evidence_page import write_page

        write_page(options.output, ROOT / "docs")
        return
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # finetune would use a GPU if there is one
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; leave out --device")
    scale = "quick" if options.quick else options.scale
    scale = scale or ("full" if options.device == "cuda" else "small")
    for only in options.only:
        run_all(SCALES[scale](), options.output / scale, options.workers, only)


def run_all(
    experiments: Sequence[Experiment], output: Path, workers: int = 0, only: str = ""
) -> None:
    """Train every arm with every seed whose file is missing. Late arms come after the others.

    Args:
        only: the beginning that FOLDER/ARM must have.
    """
    began = time.perf_counter()
    made = 0
    arms = [
        (experiment, arm)
        for experiment in experiments
        for arm in experiment.arms
        if f"{experiment.folder}/{arm.name}".startswith(only)
    ]
    for experiment, arm in sorted(arms, key=lambda pair: pair[0].late or pair[1].late):
        rate = rate_of(experiment, arm, output, workers)
        for seed in experiment.seeds:
            path = output / experiment.folder / f"{arm.name}-{seed}.json"
            if path.exists():
                continue
            found = run(experiment, arm, seed, rate, workers)
            _write(path, found)
            made += 1
            minutes = (time.perf_counter() - began) / 60
            print(
                f"{path.relative_to(output)}: test {100 * found['test']['top1']:.2f} %,"
                f" rate {rate:g}, {found['seconds']:.1f} s; {made} runs in {minutes:.1f} min",
                flush=True,
            )


def rate_of(experiment: Experiment, arm: Arm, output: Path, workers: int = 0) -> float:
    """The learning rate with the best accuracy on images that were kept back from training.

    These belong to the training set, and the test images are not opened. Each rate of the grid is
    tried in one run, with a seed that no reported run has. If accuracies are equal, the smaller
    loss wins.
    """
    if arm.rate is not None:
        return arm.rate
    if len(experiment.rates) == 1:
        return experiment.rates[0]
    tried = {}
    for rate in experiment.rates:
        path = output / experiment.folder / f"{arm.name}-rate-{rate:g}.json"
        if not path.exists():
            _write(path, run(experiment, arm, RATE_SEED, rate, workers, choosing=True))
        last = json.loads(path.read_text())["history"][-1]
        tried[rate] = (-last["val_acc"], last["val_loss"])
    return min(tried, key=lambda rate: tried[rate])


def run(
    experiment: Experiment,
    arm: Arm,
    seed: int,
    rate: float,
    workers: int,
    *,
    choosing: bool = False,
) -> dict[str, Any]:
    """Train one arm with one seed.

    Args:
        choosing: whether the run helps to choose a rate. Such a run sees no test images.
    """
    from evidence_data import split_of
    from rich.console import Console

    from se_inject.errors import TrainingError
    from se_inject.finetune.options.settings import Settings
    from se_inject.finetune.training.arm import Arm as Training

    settings = Settings(
        f"evidence_networks:{arm.network or experiment.network}",
        data=experiment.data,
        lr=rate,
        seed=seed,
        select="last",
        workers=workers,
        **{**experiment.recipe, **arm.options},
    )
    if choosing:
        epochs = experiment.rate_epochs
        frozen = min(settings.frozen_epochs, epochs - 1)
        settings = replace(settings, epochs=epochs, freeze_epochs=frozen)
    settings.check()
    split = split_of(experiment.data, experiment.sizes, seed, test=not choosing)
    kind = "se" if arm.se else "control"
    began = time.perf_counter()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        training = Training(settings, split, kind, seed, Path(folder), Console(quiet=True))
        try:
            found = training.train(Path(folder))
        except TrainingError as error:
            if not choosing or "the loss is" not in str(error):
                raise
            # A rate at which the loss is not a finite number cannot be chosen.
            found = {"history": [{"epoch": 0, "val_acc": 0.0, "val_loss": 1e9}]}
        gates = None
        if arm.se and not choosing and seed == min(experiment.seeds):
            kept = split_of(experiment.data, experiment.sizes, seed, test=False)
            gates = _gates(settings, kept, seed, Path(folder))
    return {
        "question": experiment.question,
        "network": arm.network or experiment.network,
        "arm": arm.name,
        "seed": seed,
        "rate": rate,
        "sizes": asdict(experiment.sizes),
        **{name: found.get(name) for name in ("test", "params", "trainable", "macs")},
        "seconds": time.perf_counter() - began,
        "gates": gates,
        "history": [_rounded(row) for row in found["history"]],
        "options": {**experiment.recipe, **arm.options},
        **_circumstances(),
    }


def _gates(settings: Any, split: Any, seed: int, folder: Path) -> dict[str, Any]:
    """What ``se-inject gates`` says about the trained network on the validation images."""
    from safetensors.torch import load_file

    from se_inject.finetune.data.loading import loader
    from se_inject.finetune.training.prepare import prepare
    from se_inject.gates import advice, gate_statistics

    prepared = prepare(settings, split, "se", seed)
    prepared.network.load_state_dict(load_file(folder / "best.safetensors"), strict=False)
    batches = loader(prepared.data.val, settings, training=False, epoch=0, rank=0, world=1)
    statistics = gate_statistics(prepared.network, batches, prepared.data.classes)
    figures = ("mean", "spread", "between", "within", "idle", "constant", "channels")
    blocks = [
        {"block": b.block} | {name: getattr(b, name) for name in figures} for b in statistics.blocks
    ]
    return {"advice": advice(statistics), "blocks": [_rounded(block) for block in blocks]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says in every run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Round each number to five digits, because people read the files."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def _circumstances() -> dict[str, Any]:
    """The commit, the versions and the machine of a run."""
    import torch

    git = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10")
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "timm", "lightning")
    return {
        "commit": commit or None,
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in names},
        "machine": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
        "precision": "bf16-mixed" if gpu else "32-true",
    }


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
