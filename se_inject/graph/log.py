"""A log of the torch functions that run on a forward's tensors."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from se_inject.graph.ops import (
    ADD,
    CHANNELS_FIRST_NORM,
    CHANNELS_LAST_LAYER,
    CONVOLUTION,
    CREATION,
    DIVIDE,
    ENLARGE,
    EXCITE,
    LIKE,
    MATRIX_PRODUCT,
    MULTIPLY,
    OVER_CHANNELS,
    PERMUTE,
    REARRANGE,
    RESHAPE,
    SIGMOID,
    Op,
)
from se_inject.graph.sums import REMEMBERED, Sum, operands, sum_of
from se_inject.torch_private import pytree

# What a tensor without values says, so that a forward goes on after ``if x.mean() > 0``.
GUESSES: dict[Any, bool | int] = {Tensor.__bool__: False, Tensor.item: 0}


# A loop that waits for another answer would wait for ever.
_MOST_GUESSES = 100


_NORMS = {F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm}


def run_on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call ``func`` with all that it makes on meta.

    The output of a norm is made up, since it is like its input: on meta a norm is a slow
    decomposition, a third of the time of a whole forward, and the first one imports the compiler.
    """
    if func in _NORMS:
        x: Tensor = args[0] if args else kwargs["input"]
        return torch.empty_like(x)
    return func(*args, **kwargs)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What a tensor held at one moment of a forward, and which values it was computed from."""

    number: int | None  # of an input: its place among the tensors that the forward was given
    op: Op | None = None  # the function that made it; None: an input, or nobody saw what
    inputs: tuple["Value", ...] = ()
    maker: Hashable = None  # what ran meanwhile, as the log was told


@dataclass(frozen=True, slots=True)
class _Known:
    """What is followed of one live tensor."""

    tensor: Tensor  # held, so that no id is used twice
    value: Value  # what it holds now: an in-place function gives the tensor another value
    channel_dim: int | None = None
    flat: bool = False  # the same at every position: pooled, or computed from what was pooled
    squeezed: bool = False  # flat, and computed from a map that was not
    excited: bool = False  # flat, and came through a layer or a sigmoid since
    sigmoid_of: int | None = None  # the id of the tensor that it is the sigmoid of


class OpLog(TorchFunctionMode):
    """Logs the functions that run on live tensors and follows where their channels are.

    Live is what is computed from the inputs, which are given with their channel dims (None: not
    known); parameters, buffers and constants are not. The channel dim is known from convolutions
    and batch or group norm (dim 1) and from Linear and layer norm (the last dim), and is followed
    through what comes after them.
    """

    def __init__(self, inputs: Iterable[tuple[Tensor, int | None]]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.maker: Hashable = None  # whoever runs now: the values made meanwhile name it
        self._guesses = 0
        self._live: dict[int, _Known] = {}
        self._made: dict[int, tuple[Tensor, str, tuple[Any, ...], Mapping[str, Any]]] = {}
        # What functions made of no live tensor, or of its shape alone (``new_empty``).
        self._constants: dict[int, Tensor] = {}
        for number, (tensor, dim) in enumerate(inputs):
            if id(tensor) not in self._live:
                self._live[id(tensor)] = _Known(tensor, Value(number), dim)

    def channel_dim(self, tensor: Tensor) -> int | None:
        """Which dim of a live tensor holds the channels, if known."""
        known = self._live.get(id(tensor))
        return known.channel_dim if known else None

    def value_of(self, tensor: Tensor) -> Value | None:
        """Where the content of a live tensor comes from."""
        known = self._live.get(id(tensor))
        return known.value if known else None

    def sum_of(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Sum | None:
        """What ``func`` adds, if it adds two maps."""
        return sum_of(_name_of(func, args, kwargs), args, kwargs, self._how)

    def remember(self, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Keep how a tensor was made that may be half of an addition in other words."""
        name = _name_of(func, args, kwargs)
        if name in REMEMBERED and isinstance(out, Tensor):
            self._made[id(out)] = (out, name, args, kwargs)

    def _how(self, tensor: Tensor) -> tuple[str, tuple[Any, ...], Mapping[str, Any]] | None:
        made = self._made.get(id(tensor))
        return made[1:] if made else None

    def guess(self, func: Callable[..., Any]) -> bool | int:
        """What a tensor without values answers.

        Raises:
            RuntimeError: so often that a loop must be waiting for another answer.
        """
        self._guesses += 1
        if self._guesses > _MOST_GUESSES:
            raise RuntimeError("it asks tensors for their values again and again")
        return GUESSES[func]

    def is_live(self, value: Any) -> bool:
        """Whether ``value`` is a tensor computed from the inputs."""
        return isinstance(value, Tensor) and id(value) in self._live

    def ensure_followed(self, value: Any, inputs: Iterable[Any]) -> None:
        """Mark what came out of a step that no torch function showed (an autograd.Function)."""
        sources = [t for t in pytree.tree_leaves(list(inputs)) if self.is_live(t)]
        for tensor in pytree.tree_leaves(value):
            followed = self.is_live(tensor) or id(tensor) in self._constants
            if isinstance(tensor, Tensor) and sources and not followed:
                same = [s for s in sources if s.shape == tensor.shape]
                dim = self.channel_dim(same[0]) if same else None
                made_of = tuple(self._live[id(s)].value for s in sources)
                self._live[id(tensor)] = _Known(tensor, Value(None, None, made_of, self.maker), dim)

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
        out = run_on_meta(func, args, kwargs)
        self.remember(func, args, kwargs, out)
        outputs = [t for t in leaves(out) if isinstance(t, Tensor)]
        sources = [t for t in leaves((args, kwargs)) if self.is_live(t)] if outputs else []
        name = _name_of(func, args, kwargs)
        if sources and name not in CREATION:
            added = sum_of(name, args, kwargs, self._how)
            if added is not None and not (self.is_live(added.a) and self.is_live(added.b)):
                added = None
            op = self._describe(name, args, kwargs, sources, outputs[0], added)
            self.ops.append(op)
            known = [self._live[id(t)] for t in sources]
            if name in LIKE:
                known = known[:1]
            made_of = tuple(dict.fromkeys(k.value for k in known))
            new = [
                self._after(
                    func, name, args, kwargs, known, o, Value(None, op, made_of, self.maker)
                )
                for o in outputs
            ]
            for entry in new:
                self._live[id(entry.tensor)] = entry
        elif name == "__setitem__" and isinstance(args[0], Tensor):
            self._write(args[0], args[2])
        else:
            self._constants.update((id(t), t) for t in outputs)
        return out

    def _write(self, target: Tensor, source: Any) -> None:
        """A part of a tensor gets other content: from then on it is computed from both."""
        known = [self._live[id(t)] for t in (target, source) if self.is_live(t)]
        if known:
            op = Op("__setitem__", tuple(target.shape))
            self.ops.append(op)
            made_of = tuple(dict.fromkeys(k.value for k in known))
            dims = [k.channel_dim for k in known if k.tensor.dim() == target.dim()]
            value = Value(None, op, made_of, self.maker)
            self._live[id(target)] = _Known(target, value, next(iter(dims), None))

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
        """Whether ``x * gate`` scales the channels of the map ``x`` alike at every position."""
        of_x, of_gate = self._live[id(x)], self._live[id(gate)]
        if x.dim() < 3 or not of_gate.excited or _is_spatial_gate(x, gate):
            return False
        if not of_gate.squeezed:  # from a time or a style, not from a map
            return False
        if x.dim() == 3 and of_x.channel_dim != 1:  # tokens: attention multiplies them
            return False
        if of_x.flat or _is_single(x):
            # A 1x1 map (of a small image) is flat itself: only a sigmoid tells a gate from a
            # product of two maps, and x * sigmoid(x) is an activation.
            return of_gate.sigmoid_of is not None and of_gate.sigmoid_of != id(x)
        return True

    def _after(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: list[_Known],
        out: Tensor,
        value: Value,
    ) -> _Known:
        flat = out.dim() <= 2 or _is_single(out) or all(s.flat for s in sources)
        squeezed = flat and any(s.squeezed or (not s.flat and s.tensor.dim() >= 3) for s in sources)
        excited = flat and (name in EXCITE or any(s.excited and s.flat for s in sources))
        sigmoid_of = id(sources[0].tensor) if name in SIGMOID else None
        if sigmoid_of is None and name not in ADD and len(sources) == 1:
            sigmoid_of = sources[0].sigmoid_of  # through a view, an expansion, a factor
        dim = self._channel_dim_after(func, name, args, kwargs, [s.tensor for s in sources], out)
        return _Known(out, value, dim, flat, squeezed, excited, sigmoid_of)

    def _channel_dim_after(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: list[Tensor],
        out: Tensor,
    ) -> int | None:
        if name in CONVOLUTION or name in CHANNELS_FIRST_NORM:
            return 1
        known = [t for t in sources if self.channel_dim(t) is not None]
        if not known:
            return out.dim() - 1 if name in CHANNELS_LAST_LAYER and out.dim() >= 3 else None
        if name in RESHAPE:
            return _kept(known[0], self._live[id(known[0])].channel_dim, out)
        source = next((t for t in known if t.dim() == out.dim()), None)
        if source is None or name in MATRIX_PRODUCT:
            return None
        dim = self.channel_dim(source)
        assert dim is not None
        if name in PERMUTE:
            return _moved(func, args, kwargs, source, dim)
        if name in REARRANGE:
            return dim if out.shape == source.shape else None
        return dim


def _name_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    name = str(getattr(func, "__name__", func))
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        name = name.split(".")[0]  # add.Tensor
    if name == "conv1d":
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        if tuple(weight.shape[:2]) == (1, 1):
            return OVER_CHANNELS
    return name


def _moved(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    source: Tensor,
    dim: int,
) -> int:
    """Where ``dim`` goes: run the same permutation on a tensor whose sizes are all different."""
    probe = torch.empty(tuple(range(1, source.dim() + 1)), device="meta")
    args, kwargs = pytree.tree_map(lambda v: probe if v is source else v, (args, dict(kwargs)))
    return tuple(func(*args, **kwargs).shape).index(dim + 1)


def _kept(source: Tensor, dim: int | None, out: Tensor) -> int | None:
    """Where ``dim`` is after a reshape, if nothing was merged with it or split from it.

    Elements keep their order, so where all sizes up to a dim stay, or all from it on, it stays.
    """
    assert dim is not None
    if source.shape[: dim + 1] == out.shape[: dim + 1]:
        return dim
    after = source.dim() - dim
    return out.dim() - after if source.shape[dim:] == out.shape[-after:] else None


def _is_single(x: Tensor) -> bool:
    """Whether a map has one position only (channels first or last)."""
    return x.dim() >= 3 and (
        all(size == 1 for size in x.shape[2:]) or all(size == 1 for size in x.shape[1:-1])
    )


def _enlarged(x: Tensor, out: Tensor) -> bool:
    """Whether a map has more positions than the one that it was made of."""
    return x.dim() >= 3 and out.shape[2:].numel() > x.shape[2:].numel()


def _is_spatial_gate(x: Tensor, gate: Tensor) -> bool:
    """Whether ``gate`` is one number for all channels of ``x``: a path weight, say."""
    if gate.dim() != x.dim():
        return gate.dim() < 2
    return all(size == 1 for size in gate.shape[1:])


def leaves(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts (a fast ``pytree.tree_leaves``)."""
    if isinstance(value, Tensor | nn.Module):
        return [value]
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in leaves(v)]
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in leaves(v)]
    return [value]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
