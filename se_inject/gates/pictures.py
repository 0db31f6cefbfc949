"""Draws gate statistics with matplotlib: a heat map, the paper's curves, and spread by depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from se_inject.errors import ArgumentError
from se_inject.gates.statistics import BlockGates, GateStatistics
from se_inject.keep.atomic import atomic_write
from se_inject.names import near_names
from se_inject.plan.table import MODEL_ITSELF

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = 24  # if there would be more tick labels than this, some are left out
_DEPTHS = 5
_CURVES = 4  # how many classes are drawn if the caller names none, as in the paper
_BINS = 256  # the columns of the heat map (blocks have 64 to 2048 channels)


def heat_map(statistics: GateStatistics) -> "Figure":
    """Draw depth × channels: the mean and the spread of each channel's class means.

    The channels of a block are sorted by their mean gate, and all blocks are stretched to one
    width. Without classes, the mean and the spread are those over the images.
    """
    blocks = statistics.blocks
    rows = [_channels(block) for block in blocks]
    means = torch.stack([_stretched(mean) for mean, _ in rows])
    spreads = torch.stack([_stretched(spread) for _, spread in rows])
    height = 1.6 + min(0.3 * len(blocks), 9)
    figure = new_figure(10, max(3.2, height))
    left, right = figure.subplots(1, 2, sharey=True)
    # The scale is symmetric about 1, the gate that does nothing.
    reach = max(0.05, float((means - 1).abs().max()))
    by_class = statistics.classes is not None
    for axes, values, title, colors, limits in (
        (left, means, "mean gate", "RdBu_r", (1 - reach, 1 + reach)),
        (right, spreads, "spread", "viridis", (0, max(1e-3, float(spreads.max())))),
    ):
        image = axes.imshow(
            values.numpy(),
            aspect="auto",
            cmap=colors,
            vmin=limits[0],
            vmax=limits[1],
            extent=(0, 100, len(blocks) - 0.5, -0.5),
            interpolation="nearest",
        )
        figure.colorbar(image, ax=axes)
        of = "class means" if by_class else "images"
        axes.set(title=f"{title} of the {of}", xlabel="channels by mean gate, %")
    _name_rows(left, blocks)
    return figure


def class_curves(statistics: GateStatistics, chosen: Sequence[str] | None = None) -> "Figure":
    """Draw the paper's curves (its section 7.2): the mean gates of some classes at five depths.

    The channels of a block are sorted by their mean over all images. The line "all" therefore
    rises, and the points of a class show how far it differs from that line.

    Args:
        chosen: the names of classes. The default is the classes whose gates differ most in the last
            block.

    Raises:
        ArgumentError: the statistics have no classes, or no class has one of these names.
    """
    names = statistics.classes
    if names is None:
        raise ArgumentError(
            "curves by class need statistics by class. Call gate_statistics with classes=."
        )
    for name in chosen or ():
        if name not in names:
            raise ArgumentError(
                f"there is no class {name!r}. Near names: {near_names(name, names)}."
            )
    if not chosen:
        picked = _most_different(statistics.blocks[-1])
    else:
        picked = [names.index(name) for name in chosen]
    blocks = _depths(statistics.blocks)
    figure = new_figure(10, 1.9 * len(blocks) + 0.8)
    panels = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    colors = [f"C{i % 10}" for i in range(len(picked))]
    for axes, block in zip(panels, blocks, strict=True):
        assert block.class_means is not None
        order = block.channel_mean.argsort()
        positions = torch.arange(block.channels).numpy()
        for index, color in zip(picked, colors, strict=True):
            values = block.class_means[index][order].numpy()
            # Lines over 2,048 channels would paint the whole panel; points leave it readable.
            points: Any = {"marker": ".", "markersize": 3, "linestyle": "none", "alpha": 0.7}
            axes.plot(positions, values, color=color, label=names[index], **points)
        mean = block.channel_mean[order].numpy()
        axes.plot(positions, mean, color="black", linewidth=1.4, label="all")
        axes.set_title(block.block or MODEL_ITSELF, fontsize=9, loc="left")
        axes.set_ylabel("gate")
        axes.margins(x=0)
    panels[-1].set_xlabel("channels by mean gate")
    handles, labels = panels[0].get_legend_handles_labels()
    short = [label if len(label) <= 28 else label[:27] + "…" for label in labels]
    columns = min(len(short), max(1, 90 // (6 + max(map(len, short)))))
    figure.legend(
        handles, short, loc="outside upper center", ncols=columns, markerscale=3, frameon=False
    )
    return figure


def spread_by_depth(statistics: GateStatistics) -> "Figure":
    """Draw how much gates differ between classes and within a class, block by block."""
    blocks = statistics.blocks
    figure = new_figure(8, 4)
    axes = figure.subplots()
    depth = range(len(blocks))
    lines = [("over all images", "0.4", [block.spread for block in blocks])]
    if statistics.classes is not None:
        nan = float("nan")
        between = [nan if block.between is None else block.between for block in blocks]
        within = [nan if block.within is None else block.within for block in blocks]
        lines += [("between classes", "C0", between), ("within a class", "C1", within)]
    for label, color, values in lines:
        axes.plot(depth, values, color=color, marker="o", markersize=4, label=label)
    axes.set(ylabel="standard deviation of the gate", xlabel="block")
    axes.set_ylim(bottom=0)
    step = -(-len(blocks) // _LABELS)
    ticks = list(depth)[::step]
    axes.set_xticks(ticks, [blocks[i].block or MODEL_ITSELF for i in ticks], rotation=90)
    axes.legend()
    return figure


def write_pictures(
    statistics: GateStatistics, folder: Path, chosen: Sequence[str] | None = None
) -> list[Path]:
    """Write all pictures as PNG and SVG into a folder, and return their paths.

    If the statistics have no classes, the curves by class are left out.
    """
    figures = {"gates-heat-map": heat_map(statistics), "gates-spread": spread_by_depth(statistics)}
    if statistics.classes is not None:
        figures["gates-classes"] = class_curves(statistics, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        path
        for name, figure in figures.items()
        for path in write_figure(figure, folder / name, ("png", "svg"))
    ]


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure, sized in inches, that no window or notebook shows by itself.

    Raises:
        ArgumentError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ArgumentError(
            "pictures need matplotlib, which is not installed: pip install 'se-inject[viz]'."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: "Figure", path: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure in these formats, each with its suffix. Equal figures give equal SVGs."""
    import matplotlib

    paths = []
    for kind in formats:
        target = path.with_name(f"{path.name}.{kind}")
        # Without a salt, the ids in an SVG are random. Without fonttype, letters become outlines.
        settings: Any = {"svg.hashsalt": "se-inject", "svg.fonttype": "none"}
        metadata = {"Date": None} if kind == "svg" else {}
        with matplotlib.rc_context(settings), atomic_write(target) as part:
            figure.savefig(part, format=kind, dpi=120, metadata=metadata)
        paths.append(target)
    return paths


def _channels(block: BlockGates) -> tuple[Tensor, Tensor]:
    """The mean and spread of the class means, or over the images, with channels sorted by mean."""
    if block.class_means is None or block.class_images is None:
        mean, spread = block.channel_mean, block.channel_variance.sqrt()
    else:
        seen = block.class_means[block.class_images > 0]
        mean, spread = seen.mean(0).double(), seen.std(0, correction=0).double()
    order = mean.argsort()
    return mean[order], spread[order]


def _stretched(values: Tensor) -> Tensor:
    """Stretch [C] to one row of the heat map. If there are too many channels, neighbours merge."""
    if len(values) > _BINS:
        return torch.nn.functional.adaptive_avg_pool1d(values[None], _BINS)[0]
    return values[torch.arange(_BINS) * len(values) // _BINS]


def _name_rows(axes: "Axes", blocks: Sequence[BlockGates]) -> None:
    step = -(-len(blocks) // _LABELS)
    ticks = list(range(len(blocks)))[::step]
    axes.set_yticks(ticks, [blocks[i].block or MODEL_ITSELF for i in ticks])


def _depths(blocks: Sequence[BlockGates]) -> list[BlockGates]:
    """Five of the blocks, from the first to the last."""
    if len(blocks) <= _DEPTHS:
        return list(blocks)
    return [blocks[round(i * (len(blocks) - 1) / (_DEPTHS - 1))] for i in range(_DEPTHS)]


def _most_different(block: BlockGates) -> list[int]:
    """A few classes in class order. Each was picked as far as possible from those before it."""
    assert block.class_means is not None
    assert block.class_images is not None
    seen = block.class_images.nonzero()[:, 0]
    means = block.class_means[seen]
    distance = (means - means.mean(0)).norm(dim=1)
    picked: list[int] = []
    for _ in range(min(_CURVES, len(seen))):
        next_one = int(distance.argmax())
        picked.append(next_one)
        distance = torch.minimum(distance, (means - means[next_one]).norm(dim=1))
        distance[picked] = -1.0
    return sorted(int(seen[i]) for i in picked)
