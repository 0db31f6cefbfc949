"""The paper's variants: which SE block is inserted, and where at an addition."""

import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from se_inject.errors import ArgumentError
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeezes import Squeeze


@dataclass(frozen=True)
class Variant:
    """Which SE block is inserted, and where. A plan, a block and its checkpoint all record this.

    Paper: the journal version of arXiv 1709.01507, section 6 (ablations).
    """

    placement: str = "standard"  # a key of sites.placements.PLACEMENTS (Tables 14, 15)
    squeeze: Squeeze = "avg"  # Table 11, Table 16
    gate: Gate = "sigmoid"  # Table 12
    bias: bool = True  # whether the two layers have biases; those of the paper's ablations do not
    init: Init = "identity"
    divisor: int = 8
    shift: bool = False  # whether a number is added to each channel after its gate

    def check(self) -> None:
        """Raise an :class:`ArgumentError` for a value that is not known."""
        for name, kind in _NAMED.items():
            check_known(name, getattr(self, name), get_args(kind))
        for name in ("bias", "shift"):
            if not isinstance(value := getattr(self, name), bool):
                raise ArgumentError(f"{name}={value!r} is neither True nor False.")

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON-ready data. ``shift`` is a key only where the block has one.

        Files of older versions do not have this key, and programs that read the report may not
        know it.
        """
        data = asdict(self)
        if not self.shift:
            del data["shift"]
        return data

    def differing(self) -> dict[str, Any]:
        """The options that differ from those of the standard block at its standard place."""
        standard = Variant()
        names = ("placement", "squeeze", "gate", "bias", "shift")
        return {
            name: value
            for name in names
            if (value := getattr(self, name)) != getattr(standard, name)
        }


def check_known(name: str, value: Any, known: Sequence[str]) -> None:
    """Raise an :class:`ArgumentError` unless ``value`` is one of the ``known`` values."""
    if value not in known:
        *first, last = map(repr, known)
        shown = reprlib.repr(value)  # a damaged file may contain a very long value
        raise ArgumentError(f"{name}={shown} is not known; use {', '.join(first)} or {last}.")


_NAMED = {"squeeze": Squeeze, "gate": Gate, "init": Init}
