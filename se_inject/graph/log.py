"""A log of the torch functions that run on a forward's tensors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from se_inject.graph.ops import (
    ADD,
    CHANNELS_FIRST_NORM,
    CHANNELS_LAST_LAYER,
    CONVOLUTION,
    CREATION,
    DIVIDE,
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


def adds_equal_shapes(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The shape, if ``func`` adds two tensors of one shape with at least three dims."""
    if getattr(func, "__name__", "") not in ADD:
        return None
    a, b = _operands(args, kwargs)
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dim() >= 3 and a.shape == b.shape:
        return tuple(a.shape)
    return None


@dataclass(frozen=True, slots=True)
class _Known:
    """What is followed of one live tensor."""

    tensor: Tensor  # held, so that no id is used twice
    channel_dim: int | None = None
    flat: bool = False  # the same at every position: pooled, or computed from what was pooled
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
        self._guesses = 0
        self._live: dict[int, _Known] = {}
        for tensor, dim in inputs:
            self._live[id(tensor)] = _Known(tensor, dim)

    def channel_dim(self, tensor: Tensor) -> int | None:
        """Which dim of a live tensor holds the channels, if known."""
        known = self._live.get(id(tensor))
        return known.channel_dim if known else None

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
            if isinstance(tensor, Tensor) and sources and not self.is_live(tensor):
                same = [s for s in sources if s.shape == tensor.shape]
                dim = self.channel_dim(same[0]) if same else None
                self._live[id(tensor)] = _Known(tensor, dim)

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
        outputs = [t for t in leaves(out) if isinstance(t, Tensor)]
        sources = [t for t in leaves((args, kwargs)) if self.is_live(t)] if outputs else []
        name = _name_of(func, args, kwargs)
        if sources and name not in CREATION:
            self.ops.append(self._describe(name, args, kwargs, sources, outputs[0]))
            known = [self._live[id(t)] for t in sources]
            new = [self._after(func, name, args, kwargs, known, o) for o in outputs]
            for entry in new:
                self._live[id(entry.tensor)] = entry
        return out

    def _describe(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: list[Tensor],
        out: Tensor,
    ) -> Op:
        shape = tuple(out.shape)
        a, b = _operands(args, kwargs)
        if name in ADD and self.is_live(a) and self.is_live(b):
            if a.dim() >= 3 and a.shape == b.shape:
                alpha = kwargs.get("alpha", 1)
                return Op(name, shape, adds_maps=True, alpha=float(alpha))
        elif name in MULTIPLY or name in DIVIDE:
            if not (self.is_live(a) and self.is_live(b)):
                return Op(name, shape, scales=True)
            if name in MULTIPLY:
                return Op(name, shape, gates=self._gates(a, b) or self._gates(b, a))
        elif name in CONVOLUTION:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return Op(name, shape, kernel=tuple(weight.shape))
        elif name == "einsum" and len(sources) == 2 and out.shape == sources[0].shape:
            return Op(name, shape, gates=self._gates(sources[0], sources[1]))
        return Op(name, shape)

    def _gates(self, x: Tensor, gate: Tensor) -> bool:
        """Whether ``x * gate`` scales the channels of the map ``x`` alike at every position."""
        of_x, of_gate = self._live[id(x)], self._live[id(gate)]
        if x.dim() < 3 or not of_gate.excited or _is_spatial_gate(x, gate):
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
    ) -> _Known:
        if name in LIKE:
            sources = sources[:1]
        flat = out.dim() <= 2 or _is_single(out) or all(s.flat for s in sources)
        excited = flat and (name in EXCITE or any(s.excited and s.flat for s in sources))
        sigmoid_of = id(sources[0].tensor) if name in SIGMOID else None
        if sigmoid_of is None and name not in ADD and len(sources) == 1:
            sigmoid_of = sources[0].sigmoid_of  # through a view, an expansion, a factor
        dim = self._channel_dim_after(func, name, args, kwargs, [s.tensor for s in sources], out)
        return _Known(out, dim, flat, excited, sigmoid_of)

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


def _is_spatial_gate(x: Tensor, gate: Tensor) -> bool:
    """Whether ``gate`` is one number for all channels of ``x``: a path weight, say."""
    if gate.dim() != x.dim():
        return gate.dim() < 2
    return all(size == 1 for size in gate.shape[1:])


def _operands(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two operands of a binary function, however they were passed."""
    values = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)]
    return (values[0], values[1]) if len(values) >= 2 else (None, None)


def leaves(value: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dicts (a fast ``pytree.tree_leaves``)."""
    if isinstance(value, tuple | list):
        return [leaf for v in value for leaf in leaves(v)]
    if isinstance(value, Mapping):
        return [leaf for v in value.values() for leaf in leaves(v)]
    return [value]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
