"""Writes docs/evidence.md and its picture from the files of evidence.py, and from nothing else."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evidence_forest import Row, forest
from evidence_list import QUESTIONS, SCALES, Arm, Experiment
from evidence_notes import DATA, FOUND, HEAD, NETWORKS, SCALE_TEXT, TAIL
from scipy.stats import ttest_rel

Run = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """How many points of accuracy an arm has more than the base arm, over the seeds of both."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "within the noise"


def write_page(results: Path, docs: Path) -> None:
    text, pictures = build(results)
    (docs / "evidence").mkdir(parents=True, exist_ok=True)
    (docs / "evidence.md").write_text(text, encoding="utf-8")
    for name, picture in pictures.items():
        (docs / "evidence" / name).write_text(picture, encoding="utf-8")


def build(results: Path) -> tuple[str, dict[str, str]]:
    """The text of the page, and its pictures by name."""
    lines: list[str] = [HEAD]
    pictures = {}
    for scale in SCALES:
        experiments = [e for e in SCALES[scale]() if _arms(results / scale, e)]
        if not experiments:
            continue
        lines += ["", f"## {SCALE_TEXT[scale]}", "", *_circumstances(results / scale)]
        name = f"forest-{scale}.svg"
        pictures[name] = forest(list(_forest_rows(results / scale, experiments)))
        lines += ["", f"![Differences of the arms with their 95 % intervals](evidence/{name})"]
        for question, title in QUESTIONS.items():
            own = [e for e in experiments if e.question == question]
            if own:
                lines += ["", f"### {question}. {title}", "", _summary(results / scale, own)]
            for experiment in own:
                lines += ["", *_table(results / scale, experiment)]
            lines += _found(scale, question)
        lines += ["", *_rates(results / scale, experiments)]
        lines += ["", *_gates(results / scale, experiments)]
        lines += _missing(results / scale, SCALES[scale]())
    return "\n".join([*lines, TAIL]), pictures


def _runs(folder: Path, experiment: Experiment, arm: Arm) -> dict[int, Run]:
    """The runs of an arm by their seeds."""
    paths = {
        seed: folder / experiment.folder / f"{arm.name}-{seed}.json" for seed in experiment.seeds
    }
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def _arms(folder: Path, experiment: Experiment) -> list[tuple[Arm, dict[int, Run]]]:
    """The arms of which all seeds have been run, or none if the base arm is not among them."""
    found = [(arm, _runs(folder, experiment, arm)) for arm in experiment.arms]
    there = [(arm, runs) for arm, runs in found if len(runs) == len(experiment.seeds)]
    has_base = any(arm.name == experiment.base for arm, _ in there)
    return there if has_base and len(there) > 1 else []


def _top1(run: Run) -> float:
    return 100 * float(run["test"]["top1"])


def difference(arm: dict[int, Run], base: dict[int, Run]) -> Difference:
    """The paired difference of the test accuracy, with its 95 % interval by Student's t."""
    seeds = sorted(arm.keys() & base.keys())
    ours, theirs = ([_top1(runs[seed]) for seed in seeds] for runs in (arm, base))
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    return Difference(mean, float(interval.low), float(interval.high), len(seeds))


def _compared(folder: Path, experiment: Experiment) -> Iterator[tuple[Arm, Difference]]:
    arms = _arms(folder, experiment)
    base = next(runs for arm, runs in arms if arm.name == experiment.base)
    for arm, runs in arms:
        if arm.name != experiment.base:
            yield arm, difference(runs, base)


# --- the parts of the page ------------------------------------------------------------------------


def _title(experiment: Experiment) -> str:
    return f"{NETWORKS[experiment.network]} on {DATA[experiment.data]}"


def _table(folder: Path, experiment: Experiment) -> Iterator[str]:
    arms = _arms(folder, experiment)
    first = next(iter(arms[0][1].values()))
    sizes, recipe = first["sizes"], first["options"]
    note = f" ({experiment.note})" if experiment.note else ""
    yield (
        f"**{_title(experiment)}**{note}: {sizes['train']:,} training and"
        f" {first['test']['images']:,} test images of {recipe['img_size']} pixels,"
        f" {recipe['epochs']} epochs, batches of {recipe['batch_size']}. The largest class has"
        f" {100 * first['test']['majority_share']:.1f} % of the test images."
    )
    yield ""
    yield (
        "| arm | test accuracy | difference, 95 % interval | | seeds | learn | parameters | MMACs"
        " | rate | seconds |"
    )
    yield "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
    compared = {arm.name: found for arm, found in _compared(folder, experiment)}
    for arm, runs in arms:
        values, any_run = [_top1(run) for run in runs.values()], next(iter(runs.values()))
        versus = compared.get(arm.name)
        shown = "" if versus is None else _interval(versus)
        seconds = statistics.median(run["seconds"] for run in runs.values())
        yield (
            f"| {arm.text} | {statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} %"
            f" | {shown} | {'' if versus is None else versus.verdict} | {len(runs)}"
            f" | {any_run['trainable']:,} | {any_run['params']:,} | {any_run['macs'] / 1e6:.2f}"
            f" | {any_run['rate']:g} | {seconds:.0f} |"
        )


def _interval(found: Difference) -> str:
    return f"{_signed(found.mean)} ({_signed(found.low)} to {_signed(found.high)})"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _summary(folder: Path, experiments: Sequence[Experiment]) -> str:
    """Say how many intervals of the arms with SE exclude 0."""
    verdicts = [
        found.verdict
        for experiment in experiments
        for arm, found in _compared(folder, experiment)
        if arm.se and not experiment.note
    ]
    counts = {word: verdicts.count(word) for word in ("better", "worse", "within the noise")}
    return (
        f"Comparisons of an arm with SE: {len(verdicts)}. Better than without by more than the"
        f" noise: {counts['better']}; worse: {counts['worse']}; within the noise:"
        f" {counts['within the noise']}."
    )


def _found(scale: str, question: int) -> list[str]:
    text = FOUND.get((scale, question), "")
    return ["", text.rstrip()] if text else []


def _circumstances(folder: Path) -> list[str]:
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json"))]
    known = {
        name: sorted({run[name] or "unknown" for run in runs}) for name in ("commit", "machine")
    }
    versions = runs[-1]["versions"]
    reported = sum(run["test"] is not None for run in runs)
    hours = sum(run["seconds"] for run in runs) / 3600
    return [
        f"{reported} runs are reported here, and {len(runs) - reported} runs chose rates. Together"
        f" they took {hours:.1f} hours ({', '.join(known['machine'])}). The commits were"
        f" {', '.join(known['commit'])}, with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "."
    ]


def _gates(folder: Path, experiments: Sequence[Experiment]) -> Iterator[str]:
    """A table of what the gates do in the first seed of each arm with SE."""
    yield "### What the gates do"
    yield ""
    yield (
        "The figures are those of the first seed of each arm, on the validation images, over all"
        " channels (by `se-inject gates`). A gate begins at 1. An idle gate is always within 1 % of"
        " that, and a fixed gate hardly varies."
    )
    yield ""
    yield "| network and data | arm | blocks | idle | fixed | mean gate | spread over the images |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for experiment in experiments:
        for arm, runs in _arms(folder, experiment) if not experiment.note else ():
            gates = next((run["gates"] for run in runs.values() if run["gates"]), None)
            if gates is None:
                continue
            blocks = gates["blocks"]
            shares = [_mean(blocks, name) for name in ("idle", "constant", "mean", "spread")]
            yield (
                f"| {_title(experiment)} | {arm.text} | {len(blocks)} | {100 * shares[0]:.0f} %"
                f" | {100 * shares[1]:.0f} % | {shares[2]:.3f} | {shares[3]:.3f} |"
            )


def _rates(folder: Path, experiments: Sequence[Experiment]) -> Iterator[str]:
    """A table of the accuracy of each rate on the images on which the rates were compared."""
    rates = sorted({rate for experiment in experiments for rate in experiment.rates})
    yield "### How the rates were chosen"
    yield ""
    yield (
        "The table has the accuracy on the images that were kept back from training, at each rate"
        " of the grid. If accuracies are equal, the rate with the smaller loss was taken."
    )
    yield ""
    yield f"| network and data | arm | images | epochs | {' | '.join(map(str, rates))} |"
    yield "|---|---|---:|---:|" + "---:|" * len(rates)
    seen = set()
    for experiment in experiments:
        for arm in experiment.arms:
            stem = folder / experiment.folder / arm.name
            paths = [Path(f"{stem}-rate-{rate:g}.json") for rate in rates]
            if stem in seen or not all(path.exists() for path in paths):
                continue
            seen.add(stem)
            last = [json.loads(path.read_text())["history"][-1] for path in paths]
            cells = [f"{100 * row['val_acc']:.1f} %" for row in last]
            yield (
                f"| {_title(experiment)} | {arm.text} | {experiment.sizes.val}"
                f" | {last[0]['epoch']} | {' | '.join(cells)} |"
            )


def _missing(folder: Path, experiments: Sequence[Experiment]) -> list[str]:
    """List the arms that have not been trained with every seed."""
    missing: dict[str, dict[str, None]] = {}
    for experiment in experiments:
        for arm in experiment.arms:
            if len(_runs(folder, experiment, arm)) < len(experiment.seeds):
                missing.setdefault(_title(experiment), {})[arm.text] = None
    rows = [f"- {title}: {'; '.join(arms)}" for title, arms in missing.items()]
    return ["", "### Not trained yet", "", *rows] if rows else []


def _mean(blocks: Sequence[dict[str, Any]], name: str) -> float:
    """The mean over all channels of all blocks."""
    channels = sum(block["channels"] for block in blocks)
    return float(sum(block[name] * block["channels"] for block in blocks) / channels)


def _forest_rows(folder: Path, experiments: Sequence[Experiment]) -> Iterator[Row]:
    for experiment in sorted(experiments, key=lambda e: e.question):
        base = experiment.arm(experiment.base).text
        yield Row(f"{experiment.question}. {_title(experiment)}, against: {base}", None)
        for arm, found in _compared(folder, experiment):
            yield Row(arm.text, (found.mean, found.low, found.high))
