"""What the rules for units find in a history."""

from dataclasses import dataclass, field

from se_inject.reasons import Reason


@dataclass(frozen=True)
class Unit:
    """A unit of convolutions whose end will be scaled. It is not yet a node of a block graph."""

    calls: tuple[int, ...]  # the SE block goes into the first of these that can be traced
    end: int  # the map that the SE block reads
    first: int  # the first event of the unit
    leaf: bool = False  # whether the SE block goes into the activation itself, a plain layer


@dataclass
class Found:
    """The units of a history, and those that get no SE block."""

    units: list[Unit] = field(default_factory=list)
    # A key is the block, the reason, and the number of the operation in the block. A block that
    # runs twice is listed once.
    skipped: dict[tuple[str, Reason, int], None] = field(default_factory=dict)

    def skip(self, block: str, reason: Reason, operation: int) -> None:
        self.skipped[block, reason, operation] = None
