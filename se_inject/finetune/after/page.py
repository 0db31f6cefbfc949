"""``page.html`` of a run folder: all that a run found, in one file that loads nothing else.

The page needs no script. Its pictures are inline SVG, and the samples of the data are PNG.
"""

import copy
import csv
import dataclasses
import json
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from se_inject.api import remove_se
from se_inject.errors import ArgumentError, SEInjectError
from se_inject.finetune.after import page_figures
from se_inject.finetune.after.evaluate import evaluate
from se_inject.finetune.after.looked import batches_of_run, split_of_run
from se_inject.finetune.after.trained import Trained, load_run
from se_inject.finetune.data.parts import Split
from se_inject.finetune.options.choices import WITHOUT_SE
from se_inject.finetune.options.settings import Settings
from se_inject.gates import GateStatistics, advice, gate_statistics, verdict
from se_inject.gates.pictures import class_curves, heat_map, spread_by_depth
from se_inject.keep.atomic import atomic_write
from se_inject.plan.table import MODEL_ITSELF
from se_inject.report.saved import Savings, measure_savings

PAGE = "page.html"
_SAMPLES = 12  # the most classes of which an image is shown
_MATRIX = 20  # the most classes that the confusion matrix is shown for
_PAIRS = 20  # with more classes, so many of the most frequent mistakes are listed instead


def write_page(folder: Path, *, trust_code: bool = False, benchmark: bool = False) -> Path:
    """Write the page of a finished run into its folder.

    The chosen network runs over the validation images twice: once to measure it, and once to
    observe its gates. A run with --train head, norm or bias has no SE blocks, so its page says
    nothing about gates and cost.

    Raises:
        ArgumentError, CheckpointError, DataError: for the same reasons as :func:`load_run` and
            :func:`evaluate`, or because metrics.csv is damaged.
    """
    run = load_run(folder, trust_code=trust_code)
    summary = json.loads((folder / "summary.json").read_text())
    measured = evaluate(run, folder)
    split = split_of_run(run, folder)
    has_se = run.settings.train not in WITHOUT_SE
    context = {
        "model": run.settings.model,
        "data": Path(run.settings.data).name if _is_path(run.settings.data) else run.settings.data,
        "summary": summary,
        "size": "×".join(map(str, summary["input_size"])),
        "parts": list(split.parts),
        "counts": _counts(split),
        "samples": list(_samples(split)),
        "curves": page_figures.inline_svg(
            page_figures.curves(_rows(folder, summary)), "loss and accuracy over the epochs"
        ),
        "measured": measured,
        "matrix": _matrix(folder, run.classes),
        "pairs": _pairs(folder, run.classes),
        "has_se": has_se,
        **(_about_se(run, split, benchmark) if has_se else {}),
        "command": command_of(run.settings),
        "versions": _versions(),
    }
    with atomic_write(folder / PAGE) as part:
        part.write_text(_template().render(context), encoding="utf-8")
    return folder / PAGE


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.2f} %"
    environment.filters["number"] = lambda x: "–" if x is None else f"{x:.3f}"
    environment.filters["count"] = lambda x: "–" if x is None else f"{x:,}"
    text = (
        resources.files("se_inject.finetune.after").joinpath("page.html.jinja").read_text("utf-8")
    )
    return environment.from_string(text)


# --- what it was trained on ----------------------------------------------------------------------


def _counts(split: Split) -> list[tuple[str, list[int]]]:
    """Each class with the number of its images in each part."""
    columns = list(split.counts().values())
    return [(name, [column[i] for column in columns]) for i, name in enumerate(split.classes)]


def _samples(split: Split) -> Iterator[tuple[str, str]]:
    """Evenly spaced classes, each with its first training image that can be read."""
    part, total = split.parts["train"], len(split.classes)
    for i in range(min(total, _SAMPLES)):
        label = i * total // min(total, _SAMPLES)
        indices = [n for n, own in zip(part.indices, part.labels, strict=True) if own == label]
        for index in indices[:3]:
            try:
                image, _ = part.source[index]
            except (OSError, SyntaxError, ValueError):
                continue
            yield split.classes[label], page_figures.thumbnail(image)
            break


def _rows(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of metrics.csv as numbers."""
    path = folder / "metrics.csv"
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        numbers = ("train_loss", "val_loss", "val_acc")
        return [
            {"arm": row["arm"], "seed": row["seed"], "epoch": int(row["epoch"])}
            | {name: float(row[name]) for name in numbers}
            for row in rows
        ]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise ArgumentError(f"{path} is damaged or not there ({error}).") from error


# --- what it is worth ----------------------------------------------------------------------------


def _read_matrix(folder: Path) -> Tensor:
    with (folder / "confusion.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    return torch.tensor([[int(value) for value in row[1:]] for row in rows])


def _matrix(folder: Path, classes: Sequence[str]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Each true class with its counts and their shares of the row, or nothing for many classes."""
    if len(classes) > _MATRIX:
        return []
    matrix = _read_matrix(folder)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    return [
        (name, list(zip(counts, own, strict=True)))
        for name, counts, own in zip(classes, matrix.tolist(), shares.tolist(), strict=True)
    ]


def _pairs(folder: Path, classes: Sequence[str]) -> list[tuple[str, str, int]]:
    """The most frequent mistakes, each as (true class, predicted class, number of images)."""
    if len(classes) <= _MATRIX:
        return []
    matrix = _read_matrix(folder)
    matrix.fill_diagonal_(0)
    values, places = matrix.flatten().topk(_PAIRS)
    return [
        (classes[place // len(classes)], classes[place % len(classes)], value)
        for value, place in zip(values.tolist(), places.tolist(), strict=True)
        if value
    ]


def _about_se(run: Trained, split: Split, benchmark: bool) -> dict[str, Any]:
    """What the page says about the SE blocks: their gates and their cost."""
    statistics = gate_statistics(run.network, batches_of_run(run, split), run.classes)
    return {
        "advice": advice(statistics),
        "gates": [
            (block.block or MODEL_ITSELF, block, verdict(block)) for block in statistics.blocks
        ],
        "gate_pictures": list(_gate_pictures(statistics)),
        "cost": _cost(run, benchmark),
    }


def _gate_pictures(statistics: GateStatistics) -> Iterator[tuple[str, str]]:
    for name, figure in (
        ("Mean gates by depth and channel", heat_map(statistics)),
        ("Gates of some classes at several depths", class_curves(statistics)),
        ("Spread of the gates by depth", spread_by_depth(statistics)),
    ):
        yield name, page_figures.inline_svg(figure, name)


def _cost(run: Trained, benchmark: bool) -> Savings | None:
    """The cost with and without the SE blocks, or None if it cannot be counted."""
    plain = remove_se(copy.deepcopy(run.network))
    try:
        return measure_savings(run.network, plain, benchmark=benchmark)
    except SEInjectError:  # the forward asks tensors for values, which meta tensors do not have
        return None


# --- how to repeat it ----------------------------------------------------------------------------


def command_of(settings: Settings) -> str:
    """The command line that repeats a run, with all options that differ from their defaults.

    Paths below the working directory are written relative to it.
    """
    words = ["se-inject", "finetune", settings.model, "--data", _typed(settings.data)]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("model", "data") or value == field.default or value is None:
            continue
        name = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, Mapping):
            words += [name, ",".join(f"{glob}={r}" for glob, r in value.items())]
        elif isinstance(value, tuple | list):
            for each in value:
                words += [name, str(each)]
        else:
            words += [name, _typed(str(value))]
    return shlex.join(words)


def _is_path(value: str) -> bool:
    return Path(value).is_absolute()


def _typed(value: str) -> str:
    here = Path.cwd()
    inside = _is_path(value) and Path(value).is_relative_to(here)
    return str(Path(value).relative_to(here)) if inside else value


def _versions() -> dict[str, str]:
    names = ("se-inject", "torch", "timm", "lightning")
    return {"Python": platform.python_version()} | {name: metadata.version(name) for name in names}
