"""The pictures of a run's page: matplotlib's SVG within HTML, on a light or dark background."""

import base64
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from se_inject.gates.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"se": "C0", "control": "C1"}
_SAMPLE = 56  # pixels, the side of a sample image


def inline_svg(figure: "Figure", name: str) -> str:
    """Write a figure as an ``<svg>`` element, in which the page's text colour replaces black.

    Args:
        name: what the picture shows, for people who have the page read to them. The ids inside are
            hashed with it, because all pictures of a page share one space of ids.
    """
    import matplotlib

    settings: Any = {"svg.hashsalt": name, "svg.fonttype": "none"}
    for axes in figure.axes:
        if legend := axes.get_legend():
            legend.get_frame().set_alpha(0)  # it would be a white patch on a dark page
    out = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, rest = svg.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    label = name.replace("&", "&amp;").replace('"', "&quot;")
    rest = rest.replace("#000000", "currentColor")
    # A hundredth of a point is finer than any screen. More digits would fill half of the file.
    rest = re.sub(r'\b(d|x|y|transform)="[^"]*"', lambda m: _rounded(m.group()), rest)
    return f'{head} role="img" aria-label="{label}">{rest}'


def _rounded(attribute: str) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute)


def curves(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Loss and validation accuracy over the epochs, one line for each arm and seed."""
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    for arm, seed in dict.fromkeys((row["arm"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
        epochs, color = [row["epoch"] for row in own], _COLORS[arm]
        line: Any = {"color": color, "marker": ".", "label": f"{_arm(arm)}, seed {seed}"}
        left.plot(epochs, [row["train_loss"] for row in own], color=color, linestyle=":")
        left.plot(epochs, [row["val_loss"] for row in own], **line)
        right.plot(epochs, [100 * row["val_acc"] for row in own], **line)
    left.set(xlabel="epoch", ylabel="loss (dotted: training)")
    right.set(xlabel="epoch", ylabel="validation accuracy in %")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    return figure


def _arm(arm: str) -> str:
    return "with SE" if arm == "se" else "without SE"


def thumbnail(image: Image.Image) -> str:
    """A small PNG of an image as a ``data:`` address."""
    small = image.convert("RGB")
    small.thumbnail((_SAMPLE, _SAMPLE))
    if max(small.size) < _SAMPLE:  # such as digits of 8 x 8 pixels
        scale = _SAMPLE // max(small.size)
        size = small.width * scale, small.height * scale
        small = small.resize(size, Image.Resampling.NEAREST)
    out = io.BytesIO()
    small.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
