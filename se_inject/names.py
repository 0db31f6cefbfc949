"""Names of blocks: how messages show them, which of them a glob matches, and which are similar.

This file also knows how the models are named that ``se_inject.timm`` adds to timm's registry.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from se_inject.errors import ArgumentError


def block_label(name: str) -> str:
    """The name of a block as users read it; the root module has the empty name."""
    return f"'{name}'" if name else "the model itself"


# The names of injected models in timm's registry begin with this.
REGISTERED = "se_inject_"


def base_architecture(name: str) -> str:
    """The name of the base: ``resnet50`` for ``se_inject_resnet50`` and for ``resnet50`` itself."""
    return name.removeprefix(REGISTERED)


Patterns = str | Sequence[str] | None


def matching(
    names: Sequence[str],
    patterns: str | Sequence[str],
    argument: str,
    what: str = "block with an addition",
) -> set[str]:
    """The names that at least one of the globs matches. Each glob must match at least one name.

    Raises:
        ArgumentError: a glob matches no name (the message shows similar names) or is not a text.
    """
    matched: set[str] = set()
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(
                f"{argument} takes a glob or a list of globs on names, not {pattern!r}."
            )
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(
                f"{argument}={pattern!r} matches no {what}."
                f" Names are like {near_names(pattern, names)}."
            )
        matched |= hits
    return matched


def near_names(name: str, names: Sequence[str]) -> str:
    """A few of the names for an error message, the most similar ones first."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    return ", ".join(map(repr, dict.fromkeys(near)))


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


def plural(count: int, noun: str) -> str:
    """``1 site``, ``16 sites``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
