"""What a tensor held at one moment of a forward, and what is followed of it."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from se_inject.graph.operations.ops import Op


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What a tensor held at one moment of a forward, and which values it was computed from."""

    number: int | None  # of an input: its place among the tensors that the forward was given
    op: Op | None = None  # the function that made it; None: an input, or nobody saw what
    inputs: tuple["Value", ...] = ()
    maker: Hashable = None  # what ran meanwhile, as the log was told


@dataclass(frozen=True, slots=True)
class Known:
    """What is followed of one live tensor."""

    tensor: Tensor  # held, so that no id is used twice
    value: Value  # what it holds now: an in-place function gives the tensor another value
    channel_dim: int | None = None
    flat: bool = False  # the same at every position: pooled, or computed from what was pooled
    squeezed: bool = False  # flat, and computed from a map that was not
    excited: bool = False  # flat, and came through a layer or a sigmoid since
    sigmoid_of: int | None = None  # the id of the tensor that it is the sigmoid of

    @property
    def is_gate(self) -> bool:
        """Whether a map that is multiplied by it is gated."""
        return self.flat and self.squeezed and self.excited
