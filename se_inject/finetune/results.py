"""What a run says of itself at the end: the summary, its verdict, the curves and the rows."""

import csv
import statistics
import warnings
from pathlib import Path
from typing import Any

from se_inject.keep.atomic import atomic_write


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_write(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
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
            "mean": statistics.fmean(r["val_acc"] for r in own),
            "sd": statistics.stdev(r["val_acc"] for r in own) if len(own) > 1 else None,
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


def verdict(arms: dict[str, list[dict[str, Any]]]) -> str:
    """What the arms say, from a paired t-test: both arms of a seed saw the same batches."""
    if "control" not in arms:
        return "No control arm: --control says whether the SE blocks helped."
    se, control = ([100 * r["val_acc"] for r in arms[arm]] for arm in ("se", "control"))
    mean = statistics.fmean(se) - statistics.fmean(control)
    if len(se) < 2:
        return f"With SE {mean:+.2f} points; one seed says nothing of the noise (--seeds 3)."
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():  # of differences that are all the same
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ttest_rel(se, control).confidence_interval(0.95)
    margin = (interval.high - interval.low) / 2
    beyond = "more than the noise" if abs(mean) > margin else "within the noise"
    return (
        f"With SE {mean:+.2f} points, 95 % interval ±{margin:.2f} over {len(se)} seeds: {beyond}."
    )


def curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and accuracy over the epochs, with one line for each arm and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = {"se": "tab:blue", "control": "tab:orange"}
    for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        epochs, color = [row["epoch"] for row in own], colors[arm]
        left.plot(epochs, [row["train_loss"] for row in own], color=color, linestyle=":")
        left.plot(epochs, [row["val_loss"] for row in own], color=color, label=f"{arm}, {seed}")
        right.plot(
            epochs, [100 * row["val_acc"] for row in own], color=color, label=f"{arm}, {seed}"
        )
    left.set(xlabel="epoch", ylabel="loss (dotted: training)")
    right.set(xlabel="epoch", ylabel="validation accuracy in %")
    right.legend(title="arm, seed")
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)
