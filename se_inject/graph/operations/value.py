"""What a tensor held at one moment of a forward, and what the log follows about it."""

from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from se_inject.graph.operations.ops import Op


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What a tensor held at one moment of a forward, and from which values it was computed."""

    number: int | None  # the place of an input among the tensors that the forward was given
    op: Op | None = None  # the function that made it; None for an input, or if nobody saw it
    inputs: tuple["Value", ...] = ()
    maker: Hashable = None  # what ran at that moment, as the log was told


@dataclass(frozen=True, slots=True)
class Known:
    """What the log knows about one live tensor."""

    tensor: Tensor  # it is kept, so that no id is used twice
    value: Value  # what it holds now; an in-place function gives the tensor another value
    channel_dim: int | None = None
    flat: bool = False  # whether it is the same at every position (pooled, or made from pooled)
    squeezed: bool = False  # whether it is flat and was computed from a map that was not flat
    excited: bool = False  # whether it is flat and then passed through a layer or a sigmoid
    sigmoid_of: int | None = None  # the id of the tensor whose sigmoid it is

    @property
    def is_gate(self) -> bool:
        """Whether a map becomes gated if it is multiplied by this tensor."""
        return self.flat and self.squeezed and self.excited
