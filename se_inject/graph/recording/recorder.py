"""The mode and the hooks that watch one forward of the copy on meta."""

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from se_inject.graph.containers import rebuilt, tensors_in
from se_inject.graph.operations.log import GUESSES, OpLog
from se_inject.graph.recording.call import Added, Arguments, Call
from se_inject.graph.recording.state import changed, state_of
from se_inject.torch_private import without_torch_functions


class Recorder(OpLog):
    """Attributes each addition of two equal shapes to the innermost module that runs."""

    def __init__(self, model: nn.Module, inputs: Arguments, follow: bool, guesses: bool) -> None:
        super().__init__((tensor, None) for tensor in tensors_in(inputs))
        self.follow = follow
        self.guesses = guesses
        self.guessed: dict[str, None] = {}
        self.calls: dict[str, list[Call]] = {}
        self.running: list[tuple[str, Call]] = []
        self.states: list[dict[str, Any]] = []
        self.error: BaseException | None = None
        self.failed = ""  # the module that raised it
        self.hooks: list[RemovableHandle] = []
        for name, module in model.named_modules():
            if type(module).__module__.startswith("torch.nn.modules.") and not module._modules:
                continue  # a plain layer, as most modules are, adds no maps
            enter = functools.partial(self._enter, name)
            self.hooks += [  # nn.Module registers them, as a class may have its own such methods
                nn.Module.register_forward_pre_hook(module, enter, prepend=True, with_kwargs=True),
                nn.Module.register_forward_hook(module, self._leave, always_call=True),
            ]

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        args, kwargs = rebuilt(args), rebuilt(kwargs) if kwargs else {}
        dims = tuple(self.channel_dim(tensor) for tensor in tensors_in((args, kwargs)))
        call = Call(args, kwargs, dims, name=name)
        if self.follow:
            given = tensors_in((args, kwargs))
            call.past = tuple(map(self.value_of, given))
            call.gates = {i: gate for i, t in enumerate(given) if (gate := self.gate(t))}
        self.calls.setdefault(name, []).append(call)
        if self.running:
            call.caller = self.running[-1][1]
            call.caller.children.setdefault(name, []).append(call)
        self.running.append((name, call))
        self.states.append(state_of(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name, call = self.running.pop()
        error = sys.exc_info()[1]
        if error is not None and error is not self.error:  # the innermost module leaves first
            self.error, self.failed = error, name
        if self.follow:
            self.ensure_followed(output, args)
        call.output = rebuilt(output)
        call.returned = output
        call.sets = changed(self.states.pop(), state_of(module))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.running and func in GUESSES:
            if not self.guesses:
                return func(*args, **kwargs)
            self.guessed[self.running[-1][0]] = None
            return self.guess(func)
        with without_torch_functions():
            added = self.sum_of(func, args, kwargs) if self.running else None
            values = (self.value_of(added.a), self.value_of(added.b)) if added else (None, None)
        if self.follow:
            out = super().__torch_function__(func, types, args, kwargs)
        else:
            out = func(*args, **kwargs)
            self.remember(func, args, kwargs, out)
        if added is not None:
            call = self.running[-1][1]
            with without_torch_functions():
                call.additions.append(tuple(added.a.shape))
            call.sums.append(Added(added, out, values))
        return out
