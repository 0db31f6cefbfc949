"""What the rules of units find on a history."""

from dataclasses import dataclass, field

from se_inject.reasons import Reason


@dataclass(frozen=True)
class Unit:
    """A unit of convolutions whose end is to be scaled; not yet a node of a block graph."""

    calls: tuple[int, ...]  # where the SE block goes: the first of these that can be traced
    end: int  # the map that the SE block reads
    first: int  # the first event of the unit
    leaf: bool = False  # the SE block goes into the activation, a plain layer


@dataclass
class Found:
    """The units of a history, and those that get no SE block."""

    units: list[Unit] = field(default_factory=list)
    # Block, reason, and which of the block's operations: a block that runs twice is skipped once.
    skipped: dict[tuple[str, Reason, int], None] = field(default_factory=dict)

    def skip(self, block: str, reason: Reason, operation: int) -> None:
        self.skipped[block, reason, operation] = None
