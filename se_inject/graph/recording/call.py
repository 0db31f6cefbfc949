"""One recorded call of a module, with what it added; and what a whole recording holds."""

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
    # Where the two maps come from; None where the forward was not followed.
    values: tuple[Value | None, Value | None]

    @property
    def is_gated(self) -> bool:
        """Whether one of the two maps was gated since their ways parted."""
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
    channel_dims: tuple[int | None, ...]  # of its tensors, where the forward has shown them
    past: tuple[Value | None, ...] | None = None  # of its tensors, where the forward was followed
    # Those of its tensors, by their places, that came as gates, where the forward was followed.
    gates: dict[int, Known] = field(default_factory=dict)
    caller: "Call | None" = None
    sums: list["Added"] = field(default_factory=list)
    adders: set[str] = field(default_factory=set)  # children that only add what they are given
    additions: list[Shape] = field(default_factory=list)
    output: Any = None
    name: str = ""  # of the module
    returned: Any = None  # the output itself, where ``output`` has new containers
    sets: tuple[str, ...] = ()  # attributes that the forward set on its module
    children: dict[str, list["Call"]] = field(default_factory=dict)  # calls that it made

    def log(self) -> OpLog:
        """A fresh log that follows the tensors of this call."""
        tensors = tensors_in((self.args, self.kwargs))
        return OpLog(zip(tensors, self.channel_dims, strict=True), self.gates)

    @functools.cached_property
    def signature(self) -> Hashable:
        """Equal for calls that a graph cannot tell apart."""
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
    missed: tuple[str, ...]  # modules that could hold a block and did not run to their end then
    guessed: tuple[str, ...]  # modules whose way depends on values: taken as false or 0
    example: Arguments
