"""Which blocks are wanted, and the reduction ratio of each."""

from collections.abc import Mapping, Sequence

from se_inject.errors import ArgumentError
from se_inject.names import Patterns, matching
from se_inject.plan.injection import Ratio


def ratios_of(
    wanted: Sequence[str], names: Sequence[str], r: Ratio, what: str = "block with an addition"
) -> dict[str, int]:
    """The reduction ratio of each wanted block. In a mapping, the first glob that matches counts.

    Raises:
        ArgumentError: a glob matches no name, or no glob matches a wanted block.
    """
    if not isinstance(r, Mapping):
        return dict.fromkeys(wanted, r)
    matches = {pattern: matching(names, pattern, "r", what) for pattern in r}
    ratios = {}
    for name in wanted:
        pattern = next((p for p in r if name in matches[p]), None)
        if pattern is None:
            raise ArgumentError(f"r={dict(r)} gives no number for block {name!r}. Add '*': 16.")
        ratios[name] = r[pattern]
    return ratios


def selected(
    names: Sequence[str],
    include: Patterns,
    exclude: Patterns,
    what: str = "block with an addition",
) -> set[str]:
    """The names that ``include`` matches (None: all of them) and ``exclude`` does not.

    Raises:
        ArgumentError: a glob matches no name.
    """
    wanted = matching(names, include, "include", what) if include is not None else set(names)
    return wanted - (matching(names, exclude, "exclude", what) if exclude is not None else set())
