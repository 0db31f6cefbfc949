"""A log of the torch functions that run on a forward's tensors."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from se_inject.graph.containers import leaves, tensors_in
from se_inject.graph.operations.channels import channel_dim_after
from se_inject.graph.operations.gating import followed, gates
from se_inject.graph.operations.ops import (
    CONVOLUTION,
    CREATION,
    DIVIDE,
    ENLARGE,
    LIKE,
    MULTIPLY,
    OVER_CHANNELS,
    Op,
)
from se_inject.graph.operations.sums import REMEMBERED, Sum, operands, sum_of
from se_inject.graph.operations.value import Known, Value
from se_inject.torch_private import pytree, without_torch_functions

# What a tensor without values answers, so that a forward goes on after ``if x.mean() > 0``.
GUESSES: dict[Any, bool | int] = {Tensor.__bool__: False, Tensor.item: 0}


# The limit on such answers, because a loop that waits for another answer would wait for ever.
_MOST_GUESSES = 100


class OpLog(TorchFunctionMode):
    """Logs the functions that run on live tensors and follows where their channels are.

    A tensor is live if it is computed from the inputs. Parameters, buffers and constants are not
    live. The channel dim is known from convolutions and batch or group norms (dim 1), and from
    Linear and layer norms (the last dim). It is followed through the functions after them.

    Args:
        inputs: the tensors that the forward is given, each with its channel dim (None if that is
            not known).
        gates: those of the inputs that were computed as gates before, by their places.
    """

    def __init__(
        self,
        inputs: Iterable[tuple[Tensor, int | None]],
        gates: Mapping[int, Known] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.maker: Hashable = None  # what runs now; the values that are made meanwhile name it
        self._guesses = 0
        self._live: dict[int, Known] = {}
        self._made: dict[int, tuple[Tensor, str, tuple[Any, ...], Mapping[str, Any]]] = {}
        # The tensors that were made from no live tensor, or from its shape alone (``new_empty``).
        self._constants: dict[int, Tensor] = {}
        for number, (tensor, dim) in enumerate(inputs):
            if id(tensor) not in self._live:
                known = Known(tensor, Value(number), dim)
                if gate := gates.get(number):
                    known = replace(gate, tensor=tensor, value=known.value, channel_dim=dim)
                self._live[id(tensor)] = known

    def channel_dim(self, tensor: Tensor) -> int | None:
        """Which dim of a live tensor holds the channels, if that is known."""
        known = self._live.get(id(tensor))
        return known.channel_dim if known else None

    def gate(self, tensor: Tensor) -> Known | None:
        """What is known about a tensor that may be a gate computed from a map, or else None."""
        known = self._live.get(id(tensor))
        return known if known and known.is_gate else None

    def value_of(self, tensor: Tensor) -> Value | None:
        """Where the content of a live tensor comes from."""
        known = self._live.get(id(tensor))
        return known.value if known else None

    def sum_of(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Sum | None:
        """The sum that ``func`` makes, if it adds two maps."""
        return sum_of(_name_of(func, args, kwargs), args, kwargs, self._how)

    def remember(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Remember how a tensor was made, if it may be half of an addition in other words."""
        name = _name_of(func, args, kwargs)
        if name in REMEMBERED and isinstance(out, Tensor):
            self._made[id(out)] = (out, name, args, kwargs)

    def _how(self, tensor: Tensor) -> tuple[str, tuple[Any, ...], Mapping[str, Any]] | None:
        made = self._made.get(id(tensor))
        return made[1:] if made else None

    def guess(self, func: Callable[..., Any]) -> bool | int:
        """What a tensor without values answers.

        Raises:
            RuntimeError: this was asked so often that a loop must be waiting for another answer.
        """
        self._guesses += 1
        if self._guesses > _MOST_GUESSES:
            raise RuntimeError("it asks tensors for their values again and again")
        return GUESSES[func]

    def is_live(self, value: Any) -> bool:
        """Whether ``value`` is a tensor computed from the inputs."""
        return isinstance(value, Tensor) and id(value) in self._live

    def ensure_followed(self, value: Any, inputs: Iterable[Any]) -> None:
        """Mark the output of a step as live, if no torch function showed it (autograd.Function)."""
        sources = [t for t in pytree.tree_leaves(list(inputs)) if self.is_live(t)]
        for tensor in pytree.tree_leaves(value):
            followed = self.is_live(tensor) or id(tensor) in self._constants
            if isinstance(tensor, Tensor) and sources and not followed:
                same = [s for s in sources if s.shape == tensor.shape]
                dim = self.channel_dim(same[0]) if same else None
                made_of = tuple(self._live[id(s)].value for s in sources)
                self._live[id(tensor)] = Known(tensor, Value(None, None, made_of, self.maker), dim)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in GUESSES:
            return self.guess(func)
        out = func(*args, **kwargs)
        # Questions to tensors in here are not functions of the forward. This also answers faster.
        with without_torch_functions():
            self._note(func, args, kwargs, out)
        return out

    def _note(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any
    ) -> None:
        name = _name_of(func, args, kwargs)
        if name == "__setitem__" and isinstance(args[0], Tensor):
            self._write(args[0], args[2])
            return
        outputs = tensors_in(out)
        if not outputs:
            return
        if name in REMEMBERED:
            self.remember(func, args, kwargs, out)
        given = args[:1] if name in LIKE else (args, kwargs)
        sources = [t for t in leaves(given) if self.is_live(t)]
        if not sources or name in CREATION:
            self._constants.update((id(t), t) for t in outputs)
            return
        added = sum_of(name, args, kwargs, self._how)
        if added is not None and not (self.is_live(added.a) and self.is_live(added.b)):
            added = None
        op = self._describe(name, args, kwargs, sources, outputs[0], added)
        self.ops.append(op)
        known = [self._live[id(t)] for t in sources]
        made_of = tuple(dict.fromkeys(k.value for k in known))
        new = []
        for tensor in outputs:
            dim = channel_dim_after(func, name, args, kwargs, known, tensor)
            value = Value(None, op, made_of, self.maker)
            new.append(followed(name, known, tensor, value, dim))
        for entry in new:
            self._live[id(entry.tensor)] = entry

    def _write(self, target: Tensor, source: Any) -> None:
        """Note that a part of a tensor gets new content. It is then computed from both."""
        known = [self._live[id(t)] for t in (target, source) if self.is_live(t)]
        if known:
            op = Op("__setitem__", tuple(target.shape))
            self.ops.append(op)
            made_of = tuple(dict.fromkeys(k.value for k in known))
            dims = [k.channel_dim for k in known if k.tensor.dim() == target.dim()]
            value = Value(None, op, made_of, self.maker)
            self._live[id(target)] = Known(target, value, next(iter(dims), None))

    def _describe(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: list[Tensor],
        out: Tensor,
        added: Sum | None,
    ) -> Op:
        shape = tuple(out.shape)
        a, b = operands(args, kwargs)
        if added is not None:
            if added.blended:
                return Op(name, shape, blends=True)
            return Op(name, shape, adds_maps=True, alpha=added.alpha, stacked=added.stacked)
        if name in MULTIPLY or name in DIVIDE:
            if not (self.is_live(a) and self.is_live(b)):
                return Op(name, shape, scales=True)
            if name in MULTIPLY:
                return Op(name, shape, gates=self._gates(a, b) or self._gates(b, a))
        elif name in CONVOLUTION:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            enlarges = name in ENLARGE and _enlarged(sources[0], out)
            return Op(name, shape, kernel=tuple(weight.shape), enlarges=enlarges)
        elif name in ENLARGE:
            return Op(name, shape, enlarges=_enlarged(sources[0], out))
        elif name == "einsum" and len(sources) == 2 and out.shape == sources[0].shape:
            return Op(name, shape, gates=self._gates(sources[0], sources[1]))
        return Op(name, shape)

    def _gates(self, x: Tensor, gate: Tensor) -> bool:
        return gates(self._live[id(x)], self._live[id(gate)])


def _name_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    name = str(getattr(func, "__name__", func))
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = name.split(".")[0]  # add.Tensor
    if name == "conv1d":
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if tuple(weight.shape[:2]) == (1, 1):
            return OVER_CHANNELS
    return name


def _enlarged(x: Tensor, out: Tensor) -> bool:
    """Whether a map has more positions than the map from which it was made."""
    return x.dim() >= 3 and out.shape[2:].numel() > x.shape[2:].numel()
