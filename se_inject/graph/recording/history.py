"""Records a forward as a history: its operations in order, and the module calls that they ran in.

The block graphs of :mod:`se_inject.graph.trace` end at the border of a block. A unit of a network
without residual additions may cross that border: a convolution and its activation can be two
children of an ``nn.Sequential``. So units are found in the history, and then their nodes in the
block graphs.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from se_inject.graph.containers import tensors_in
from se_inject.graph.meta import on_meta
from se_inject.graph.operations.ops import JOIN, Op
from se_inject.graph.recording.call import Arguments, Call
from se_inject.graph.recording.recorder import Recorder

# A map that no operation of the history made, such as the output of an autograd.Function.
UNKNOWN = -(10**9)


@dataclass(frozen=True, slots=True)
class Event:
    """One operation. A map is named by the number of the event that made it.

    The maps that the forward was given have negative numbers.
    """

    op: Op
    call: int  # the number of the innermost module call that it ran in
    sources: tuple[int, ...]
    joined: tuple[int, ...] = ()  # the maps that a concatenation joins along the channels
    channel_dim: int | None = None


@dataclass
class ModuleCall:
    """One call of a module. Its events have the numbers from ``start`` to ``end`` - 1."""

    name: str
    parent: int | None  # the number of the call that made this one
    call: Call
    start: int
    end: int = -1
    outputs: tuple[int, ...] = ()


@dataclass
class History:
    """All events and module calls of one forward."""

    events: list[Event] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)

    def calls_of(self, name: str) -> Sequence[Call]:
        """The recorded calls of one module, from which it can be traced."""
        return [call.call for call in self.calls if call.name == name]

    def callers(self, call: int | None) -> list[int]:
        """A call and the calls that it ran in, from the innermost to the outermost."""
        found = []
        while call is not None:
            found.append(call)
            call = self.calls[call].parent
        return found


def record_history(twin: nn.Module, example: Arguments, device: torch.device) -> History:
    """Record one forward on meta tensors.

    Args:
        twin: a :func:`se_inject.graph.copies.meta_copy` of the model.
        example: the arguments that the forward accepts, as found by
            :func:`se_inject.graph.recording.record.record`.
        device: the device that the model is on. If the forward asks for devices, it gets this one.

    Raises:
        Exception: anything that the forward raises.
    """
    recorder = _HistoryRecorder(twin, example)
    args, kwargs = example
    try:
        with on_meta(device), recorder:
            twin(*args, **kwargs)
    finally:
        for hook in recorder.hooks:
            hook.remove()
    return recorder.history


class _HistoryRecorder(Recorder):
    """Numbers the operations and the calls of all modules, including plain layers."""

    def __init__(self, model: nn.Module, example: Arguments) -> None:
        super().__init__(model, example, True, True)
        self.history = History()
        self.open: list[int] = []
        given = tensors_in(example)
        self.made_by = {id(tensor): -1 - i for i, tensor in enumerate(given)}
        for name, module in model.named_modules():
            if type(module).__module__.startswith("torch.nn.modules.") and not module._modules:
                enter = functools.partial(self._enter, name)
                self.hooks += [
                    module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super()._enter(name, module, args, kwargs)
        history = self.history
        parent = self.open[-1] if self.open else None
        self.open.append(len(history.calls))
        call = self.running[-1][1]
        history.calls.append(ModuleCall(name, parent, call, len(history.events)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.history.calls[self.open.pop()]
        call.end = len(self.history.events)
        call.outputs = self._numbers(output)
        super()._leave(module, args, output)

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        before = len(self.ops)
        sources = self._numbers((args, kwargs))
        out = super().__torch_function__(func, types, args, kwargs)
        if len(self.ops) > before and self.open:
            outputs = tensors_in(out)
            dim = self.channel_dim(outputs[0])
            op = self.ops[-1]
            joined = self._joined(op, dim, args, kwargs)
            for tensor in outputs:
                self.made_by[id(tensor)] = len(self.history.events)
            self.history.events.append(Event(op, self.open[-1], sources, joined, dim))
        return out

    def _numbers(self, value: Any) -> tuple[int, ...]:
        tensors = tensors_in(value)
        return tuple(self.made_by[id(t)] for t in tensors if id(t) in self.made_by)

    def _joined(
        self, op: Op, channel_dim: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The operands of a concatenation of maps along their channels."""
        if op.name not in JOIN - {"stack"}:
            return ()
        if channel_dim is None and len(op.shape) >= 4:
            channel_dim = 1  # a 3-D tensor whose channel dim is not known counts as tokens
        axis = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
        maps = tensors_in(args[0] if args else kwargs["tensors"])
        if len(maps) < 2 or axis % len(op.shape) != channel_dim:
            return ()
        return tuple(self.made_by.get(id(tensor), UNKNOWN) for tensor in maps)


def is_container(module: nn.Module) -> bool:
    """Whether a module only runs its children in a row, so that others iterate over them."""
    return type(module).forward is nn.Sequential.forward
