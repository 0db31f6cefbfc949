"""One recorded call of a module, with what it added, and the whole recording."""

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from se_inject.graph.containers import tensors_in
from se_inject.graph.operations.log import OpLog
from se_inject.graph.operations.sums import Sum
from se_inject.graph.operations.value import Known, Value
from se_inject.torch_private import pytree

Shape = tuple[int, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Added:
    """One addition of two maps in a recorded call."""

    what: Sum
    out: Any
    # Where the two maps come from. None if the forward was not followed.
    values: tuple[Value | None, Value | None]

    @property
    def is_gated(self) -> bool:
        """Whether one of the two maps was gated after their paths parted."""
        a, b = (self._past(value) for value in self.values)
        return any(value.op is not None and value.op.gates for value in a ^ b)

    @staticmethod
    def _past(value: Value | None) -> set[Value]:
        seen: set[Value] = set()
        stack = [] if value is None else [value]
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                stack += current.inputs
        return seen


@dataclass
class Call:
    """One recorded call of a module, and the shapes that its own forward added."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    # The channel dims of the tensors in the arguments, as far as the forward has shown them.
    channel_dims: tuple[int | None, ...]
    # Where these tensors come from, if the forward was followed.
    past: tuple[Value | None, ...] | None = None
    # Those of these tensors that are gates, by their places, if the forward was followed.
    gates: dict[int, Known] = field(default_factory=dict)
    caller: "Call | None" = None
    sums: list["Added"] = field(default_factory=list)
    adders: set[str] = field(default_factory=set)  # the children that only add their inputs
    additions: list[Shape] = field(default_factory=list)
    output: Any = None  # the output in new containers
    name: str = ""  # the name of the module
    returned: Any = None  # the output itself
    sets: tuple[str, ...] = ()  # the attributes that the forward set on its module
    children: dict[str, list["Call"]] = field(default_factory=dict)  # the calls that it made

    def log(self) -> OpLog:
        """A fresh log that follows the tensors of this call."""
        tensors = tensors_in((self.args, self.kwargs))
        return OpLog(zip(tensors, self.channel_dims, strict=True), self.gates)

    @functools.cached_property
    def signature(self) -> Hashable:
        """A key that is equal for calls that a graph cannot tell apart."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return (
            str(spec),
            self.channel_dims,
            tuple(self.gates),
            tuple(
                (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
                for leaf in leaves
            ),
        )


@dataclass(frozen=True)
class Recording:
    """The calls of every module that adds maps in its own forward."""

    calls: Mapping[str, Sequence[Call]]
    stopped: str | None
    missed: tuple[str, ...]  # modules that may hold a block and then did not run to their end
    guessed: tuple[str, ...]  # modules whose path depends on values, which count as false or 0
    example: Arguments
