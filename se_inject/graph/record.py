"""Model + example input -> how its modules are called, and which of them add maps.

One forward of a copy of the model on meta tensors: no arithmetic, no memory, and the model itself
is neither run nor changed.
"""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from se_inject.errors import ForwardError, first_line
from se_inject.graph.log import GUESSES, OpLog, Value, run_on_meta, tensors_in
from se_inject.graph.meta import needs_values, on_meta
from se_inject.graph.planning import raise_interruption
from se_inject.graph.sums import Sum
from se_inject.layers.layout import KINDS, first_convolution
from se_inject.names import block_label
from se_inject.torch_private import pytree

Shape = tuple[int, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Call:
    """One recorded call of a module, and the shapes that its own forward added."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    channel_dims: tuple[int | None, ...]  # of its tensors, where the forward has shown them
    past: tuple[Value | None, ...] | None = None  # of its tensors, where the forward was followed
    caller: "Call | None" = None
    sums: list[tuple[Sum, Any]] = field(default_factory=list)  # what it added, and the result
    adders: set[str] = field(default_factory=set)  # children that only add what they are given
    additions: list[Shape] = field(default_factory=list)
    output: Any = None
    name: str = ""  # of the module
    returned: Any = None  # the output itself, where ``output`` has new containers
    sets: tuple[str, ...] = ()  # attributes that the forward set on its module
    children: dict[str, list["Call"]] = field(default_factory=dict)  # calls that it made

    def log(self) -> OpLog:
        """A fresh log that follows the tensors of this call."""
        return OpLog(zip(tensors_in((self.args, self.kwargs)), self.channel_dims, strict=True))

    @functools.cached_property
    def signature(self) -> Hashable:
        """Equal for calls that a graph cannot tell apart."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return (
            str(spec),
            self.channel_dims,
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


class _Recorder(OpLog):
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
                continue  # a plain layer: it adds no maps, and most modules are one
            enter = functools.partial(self._enter, name)
            self.hooks += [  # past what a class may have made of these methods
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
            call.past = tuple(self.value_of(t) for t in tensors_in((args, kwargs)))
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
        added = self.sum_of(func, args, kwargs) if self.running else None
        if self.follow:
            out = super().__torch_function__(func, types, args, kwargs)
        else:
            out = run_on_meta(func, args, kwargs)
            self.remember(func, args, kwargs, out)
        if added is not None:
            call = self.running[-1][1]
            call.additions.append(tuple(added.a.shape))
            call.sums.append((added, out))
        return out


def state_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, its parameters, buffers and children among them.

    The values of cached properties are left out: reading one for the first time changes no state.
    """
    state = {**vars(module), **module._parameters, **module._buffers, **module._modules}
    kinds = (vars(kind) for kind in reversed(type(module).__mro__))
    for name, value in ((n, v) for members in kinds for n, v in members.items()):
        if isinstance(value, functools.cached_property):
            state.pop(name, None)
    return state


def changed(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, ...]:
    """The names that are bound to another object than before."""
    names = dict.fromkeys([*before, *after])
    missing = object()
    return tuple(
        name for name in names if before.get(name, missing) is not after.get(name, missing)
    )


def rebuilt(value: Any) -> Any:
    """The same tensors in new containers: HRNet's modules write into the list they are given."""
    if isinstance(value, Tensor) or value is None:
        return value
    if isinstance(value, tuple) and all(isinstance(v, Tensor) for v in value):
        return value
    return pytree.tree_map(lambda leaf: leaf, value)


def record(
    twin: nn.Module, examples: Sequence[Arguments], device: torch.device, *, follow: bool = False
) -> Recording:
    """Record one forward, with the first of the examples that it accepts.

    Args:
        twin: a :func:`meta_copy` of the model.
        examples: (args, kwargs) on meta, as :func:`example_inputs` gives them.
        device: where the model is; what the forward asks about devices is answered so.
        follow: find out the channel dims of what modules are called with; it takes its time.

    Raises:
        ForwardError: the forward fails on all examples, for another reason than that it needs
            values where meta tensors have none; the message is of the one that got furthest.
    """
    failures: list[tuple[int, ForwardError]] = []
    for guesses in (True, False):
        guessed = False
        for args, kwargs in examples:
            recorder = _Recorder(twin, (args, kwargs), follow, guesses)
            try:
                return _record(twin, recorder, args, kwargs, device)
            except ForwardError as error:
                failures.append((len(recorder.calls), error))
                guessed = guessed or bool(recorder.guessed)
        if not guessed:  # otherwise a guess may have led them all astray
            break
    # The attempt that got furthest tells most: others failed at a guess of ours.
    raise max(failures, key=lambda failure: failure[0])[1]


def _record(
    twin: nn.Module,
    recorder: _Recorder,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
) -> Recording:
    stopped = None
    missed: tuple[str, ...] = ()
    try:
        with on_meta(device), recorder:
            twin(*args, **kwargs)
    except Exception as error:  # whatever a foreign forward may raise
        raise_interruption(error)
        where = recorder.failed
        reason = f"{type(error).__name__}: {first_line(error)}"
        if not needs_values(error):
            raise ForwardError(
                f"the forward of {block_label(where)} failed on an input of shape"
                f" {_describe_input(args, kwargs)}: {reason}\n"
                "Pass example_input= (on the command line --img-size, --in-chans) as the model"
                " expects it."
            ) from error
        missed = tuple(_missed(twin, recorder))
        stopped = f"{block_label(where)} needs values, which meta tensors have not ({reason[:100]})"
    finally:
        for hook in recorder.hooks:
            hook.remove()
    credit_callers(recorder.calls, dict(twin.named_modules()))
    calls = {
        name: calls
        for name, calls in recorder.calls.items()
        if any(call.additions for call in calls)
    }
    return Recording(calls, stopped, missed, tuple(recorder.guessed), (args, kwargs))


def _missed(twin: nn.Module, recorder: _Recorder) -> Iterator[str]:
    """What a forward that stopped early may not have shown: modules that convolve maps.

    A detector stops while it picks boxes. Its heads take lists of maps, where a block takes one
    map, and what would run after them convolves and adds nothing.
    """
    for name, module in twin.named_modules():
        own_forward = not type(module).forward.__module__.startswith("torch.nn.")
        if not own_forward or first_convolution(module) is None:
            continue
        calls = recorder.calls.get(name)
        if calls is None:
            if _may_add(type(module)):
                yield name
        elif name and name == recorder.failed:
            arguments = (*calls[-1].args, *calls[-1].kwargs.values())
            if len([a for a in arguments if isinstance(a, Tensor) and a.dim() in KINDS]) == 1:
                yield name


def _may_add(kind: type[nn.Module]) -> bool:
    """Whether the source of a forward has an addition; True where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            return True
        if isinstance(node, ast.Attribute) and node.attr.startswith("add"):
            return True
    return False


def credit_callers(
    recorded: Mapping[str, Sequence[Call]], modules: Mapping[str, nn.Module]
) -> None:
    """Give the addition of a module that does nothing else (``self.add(branch, x)``) to its caller.

    Its caller shows which operand is the branch. An ``nn.Sequential`` gets no child, so that what
    it calls keeps its own addition.
    """
    for name in sorted(recorded, key=len, reverse=True):  # a module after the children in it
        calls = recorded[name]
        callers = [call.caller for call in calls]
        if not all(map(_only_adds, calls)) or any(
            caller is None or isinstance(modules[caller.name], nn.Sequential) for caller in callers
        ):
            continue
        for call, caller in zip(calls, callers, strict=True):
            assert caller is not None
            caller.additions += call.additions
            caller.sums += call.sums
            caller.adders.update(
                path
                for path, child in modules[caller.name].named_modules(remove_duplicate=False)
                if child is modules[name]
            )
            call.additions, call.sums = [], []


def _only_adds(call: Call) -> bool:
    """Whether a call returned the sum of two maps that it was given, and added no others."""
    if len(call.sums) != 1:
        return False
    added, out = call.sums[0]
    given = [id(t) for t in tensors_in((call.args, call.kwargs))]
    operands = (added.a, added.b)
    plain = added.a is not added.b and not added.blended
    return out is call.returned and plain and all(id(t) in given for t in operands)


def _describe_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors_in((args, kwargs))) or "no tensor"
