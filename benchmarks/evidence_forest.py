"""Draws a forest plot as SVG: the difference of each arm is a point on the line of its interval."""

from dataclasses import dataclass
from html import escape

WIDTH, LEFT, RIGHT, LINE, TOP = 860, 330, 130, 20, 10  # pixels
_COLORS = {"better": "#1a7f37", "worse": "#b3261e", "noise": "#57606a"}


@dataclass(frozen=True)
class Row:
    """A heading, or an arm with its mean difference and both ends of its interval, in points."""

    text: str
    found: tuple[float, float, float] | None


def forest(rows: list[Row]) -> str:
    """Draw the rows from top to bottom, above one axis that shows points of accuracy."""
    ends = [abs(value) for row in rows if row.found for value in row.found]
    reach = max([1.0, *ends]) * 1.05
    height = TOP + LINE * len(rows) + 44

    def x(points: float) -> str:
        return f"{LEFT + (points + reach) / (2 * reach) * (WIDTH - LEFT - RIGHT):.1f}"

    bottom = TOP + LINE * len(rows) + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
        f' height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<line x1="{x(0)}" x2="{x(0)}" y1="{TOP}" y2="{bottom}" stroke="#8c959f"/>',
    ]
    for i, row in enumerate(rows):
        y = TOP + LINE * i + LINE / 2
        if row.found is None:
            parts.append(
                f'<text x="8" y="{y + 4:.0f}" font-weight="bold">{escape(row.text)}</text>'
            )
            continue
        mean, low, high = row.found
        color = _COLORS["better" if low > 0 else "worse" if high < 0 else "noise"]
        label = f"{mean:+.2f} ({low:+.2f}, {high:+.2f})".replace("-", "−")
        parts += [
            f'<text x="24" y="{y + 4:.0f}">{escape(row.text)}</text>',
            f'<line x1="{x(low)}" x2="{x(high)}" y1="{y:.0f}" y2="{y:.0f}" stroke="{color}"'
            ' stroke-width="2"/>',
            f'<circle cx="{x(mean)}" cy="{y:.0f}" r="4" fill="{color}"/>',
            f'<text x="{WIDTH - RIGHT + 4}" y="{y + 4:.0f}" font-size="11">{label}</text>',
        ]
    step = _step(reach)
    ticks = [step * i for i in range(-int(reach / step), int(reach / step) + 1)]
    for tick in ticks:
        text = f"{tick:+g}".replace("-", "−") if tick else "0"
        parts.append(
            f'<text x="{x(tick)}" y="{bottom + 14}" text-anchor="middle" font-size="11">'
            f"{text}</text>"
        )
    parts.append(
        f'<text x="{x(0)}" y="{bottom + 30}" text-anchor="middle">points of test accuracy more'
        " than the first arm of the table (95 % interval)</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _step(reach: float) -> float:
    """The distance between ticks: 1, 2 or 5 times a power of ten, for nine ticks or fewer."""
    for power in (0.1, 1.0, 10.0, 100.0):
        for factor in (1, 2, 5):
            if 2 * reach / (factor * power) <= 9:
                return factor * power
    return 1000.0
