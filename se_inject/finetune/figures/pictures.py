"""Pictures of a run: its curves, and the confusion matrix of its network."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from se_inject.finetune.options.trust import printable
from se_inject.keep.atomic import atomic_write

_COLORS = {"se": "tab:blue", "control": "tab:orange"}

# Fonts of various systems that have Chinese, Japanese and Korean letters. matplotlib's come first.
_CJK = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Source Han Sans", "Droid Sans"),
    *("WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Hiragino Sans", "PingFang SC", "Yu Gothic"),
    *("Microsoft YaHei", "MS Gothic", "Malgun Gothic", "NanumGothic", "IPAexGothic"),
    *("Arial Unicode MS", "Unifont"),
)


@contextmanager
def _drawing() -> Iterator[Any]:
    """Give pyplot, set up to draw without a screen and with fonts for the names of classes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot

    known = {font.name for font in font_manager.fontManager.ttflist}
    family = ["DejaVu Sans", *(name for name in _CJK if name in known)]
    with pyplot.rc_context({"font.family": family}), warnings.catch_warnings():
        # A letter that no font has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield pyplot


def curves(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    frozen_epochs: int = 0,
    best: Mapping[tuple[str, int], int] | None = None,
) -> None:
    """Draw loss and accuracy over the epochs, with a line for each arm and seed.

    Args:
        frozen_epochs: the number of epochs after which a line says that everything learns.
        best: the chosen epoch of each arm and seed, which is marked with a star.
    """
    with _drawing() as pyplot:
        from matplotlib.ticker import MaxNLocator

        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        last = max(row["epoch"] for row in rows)
        seeds = list(dict.fromkeys(row["seed"] for row in rows))  # a later seed is paler
        for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in rows):
            own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
            chosen, label = (best or {}).get((arm, seed), 0), f"{arm}, {seed}"
            look = {"color": _COLORS[arm], "alpha": max(0.3, 0.75 ** seeds.index(seed))}
            for axis, figure_of, factor in ((axes[0], "loss", 1), (axes[1], "acc", 100)):
                _line(axis, own, f"train_{figure_of}", factor, **look, linestyle=":")
                name = f"val_{figure_of}"
                _line(axis, own, name, factor, **look, label=label)
                star = [row for row in own if row["epoch"] == chosen]
                _line(axis, star, name, factor, **look, marker="*", markersize=12)
        for axis, label in zip(axes, ("loss", "accuracy in %"), strict=True):
            axis.set(xlabel="epoch", ylabel=f"{label} (dotted: training)")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.set_xlim(0.5, last + 0.5)
            if 0 < frozen_epochs < last:
                axis.axvline(frozen_epochs + 0.5, color="grey", linewidth=0.8, linestyle="--")
                axis.annotate(
                    "everything learns",
                    (frozen_epochs + 0.5, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -3),
                    textcoords="offset points",
                    va="top",
                    fontsize=8,
                    color="grey",
                )
        axes[1].legend(title="arm, seed (star: chosen)")
        with atomic_write(path) as part:
            figure.savefig(part, dpi=120)
        pyplot.close(figure)


def _line(
    axis: Any, rows: Sequence[Mapping[str, Any]], name: str, factor: float, **look: Any
) -> None:
    points = [(row["epoch"], factor * row[name]) for row in rows if row.get(name) is not None]
    if len(points) == 1:
        look.setdefault("marker", ".")  # a line of one point is invisible
    axis.plot([x for x, _ in points], [y for _, y in points], **look)


def confusion_picture(matrix: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix. Its rows are the true classes, and its colors the shares of a row.

    A cell that is not empty shows its percentage and its count. With more than 20 classes it shows
    only its count, and with more than 100 classes nothing.
    """
    count = len(classes)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    names = [printable(name) for name in classes]
    names = [name if len(name) <= 30 else name[:29] + "…" for name in names]
    with _drawing() as pyplot:
        cell = 0.55 if count <= 20 else 0.2
        size = min(40.0, 3 + cell * count)
        figure, axes = pyplot.subplots(figsize=(size, size), layout="constrained")
        image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the true class", shrink=0.6)
        axes.set(xlabel="predicted", ylabel="true")
        step = max(1, -(-count // 185))  # as many names as fit into the largest picture
        ticks, shown = range(0, count, step), names[::step]
        text = {"parse_math": False, "fontsize": 9 if count <= 20 else 7}
        axes.set_xticks(ticks, shown, rotation=90, **text)
        axes.set_yticks(ticks, shown, **text)
        for i, j in matrix.nonzero().tolist() if count <= 100 else ():
            share, value = float(shares[i, j]), int(matrix[i, j])
            axes.text(
                j,
                i,
                f"{100 * share:.0f} %\n{value}" if count <= 20 else str(value),
                ha="center",
                va="center",
                fontsize=7 if count <= 20 else 5,
                color="white" if share > 0.5 else "black",
            )
        with atomic_write(path) as part:
            figure.savefig(part, dpi=120)
        pyplot.close(figure)
