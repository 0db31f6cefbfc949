"""What a run says about itself at its end: the summary, the verdict and the table of figures."""

import csv
import statistics
import warnings
from pathlib import Path
from typing import Any

from se_inject.keep.atomic import atomic_write


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a CSV file. A row may lack some of the columns."""
    with atomic_write(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(
            file, fieldnames=list(dict.fromkeys(name for row in rows for name in row))
        )
        writer.writeheader()
        writer.writerows(rows)


def summarize(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean and standard deviation of each arm, and whether they differ by more than noise."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        arms.setdefault(result["arm"], []).append(result)
    table = {
        arm: {
            "val_acc": [r["val_acc"] for r in own],
            **_spread([r["val_acc"] for r in own]),
            "select": own[0].get("select", "best"),
            "epochs": len(own[0]["history"]),
            "best_epoch": [r.get("best_epoch") for r in own],
            "last": _spread([r["last_val_acc"] for r in own]),
            "test": _spread([r["test"]["top1"] for r in own]) if own[0].get("test") else None,
            "balanced_accuracy": _mean_at_best(own, "val_balanced"),
            "macro_f1": _mean_at_best(own, "val_macro_f1"),
            "majority_share": _mean_at_best(own, "val_majority"),
            "params": own[0]["params"],
            "macs": own[0]["macs"],
            "seconds": statistics.fmean(r["seconds"] for r in own),
        }
        for arm, own in arms.items()
    }
    return {
        "arms": table,
        "verdict": verdict(arms),
        "classes": results[0]["classes"],
        "input_size": results[0]["input_size"],
        "unreadable": sorted({name for r in results for name in r["unreadable"]}),
    }


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


def _mean_at_best(results: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a figure over the chosen epochs, or None if an older version did not keep it."""
    rows = [row for r in results for row in r["history"] if row["epoch"] == r.get("best_epoch")]
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def verdict(arms: dict[str, list[dict[str, Any]]]) -> str:
    """Say whether SE blocks helped, from a paired t-test.

    The test is paired because both arms of a seed saw the same batches. The arms are compared by
    figures that had no part in a choice: those on the test images, or else those of the last epoch.
    The accuracy of the best epoch is too high, because the epoch was chosen by this very accuracy.
    """
    if "se" not in arms:
        return (
            "No arm with SE blocks was trained. Compare these figures with those of a run with"
            " --train se+head."
        )
    if "control" not in arms:
        return "No control arm was trained. Add --control to see whether SE blocks helped."
    every = [*arms["se"], *arms["control"]]
    where, key = "", "val_acc"
    if all(r.get("test") for r in every):
        where, key = " on the test images", "test_acc"
        arms = {arm: [{key: r["test"]["top1"]} for r in own] for arm, own in arms.items()}
    elif all("last_val_acc" in r for r in every):
        where, key = " in the last epoch", "last_val_acc"
    se, control = ([100 * r[key] for r in arms[arm]] for arm in ("se", "control"))
    mean = statistics.fmean(se) - statistics.fmean(control)
    change = f"SE blocks change the accuracy{where} by {mean:+.2f} points"
    if len(se) < 2:
        return f"{change}. One seed says nothing about the noise: --seeds 3 trains three."
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():  # scipy warns if all differences are equal
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ttest_rel(se, control).confidence_interval(0.95)
    margin = (interval.high - interval.low) / 2
    beyond = "more than the noise" if abs(mean) > margin else "within the noise"
    return f"{change} (95 % interval ±{margin:.2f}, {len(se)} seeds). This is {beyond}."
