"""Model + example input -> one ``torch.fx`` graph per block that adds maps, shapes on its nodes.

Two steps, neither of which touches the model:

* **record**: one forward of a copy of the model on meta tensors (no arithmetic, no memory). It
  tells which modules add two tensors of one shape in their own forward, and how each is called.
* **trace**: each of these modules alone is traced by ``torch.fx`` with every child a leaf. The
  graph is then run on the recorded arguments, and what each node computes (its shape, which dim
  holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs, operation by operation, what the module's own forward runs:
``torch.fx`` follows one path through Python without a word where a proxy is not what the code
expects (``isinstance(x, Tensor)``), and such a graph would be another network.
"""

import contextlib
import copy
import enum
import functools
import inspect
import operator
import unittest.mock
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from se_inject.errors import ForwardError
from se_inject.ops import Op, OpLog, adds_equal_shapes, run_on_meta

Shape = tuple[int, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class NodeFacts:
    """What one node of a block graph computed on a recorded call."""

    shape: Shape | None  # None: not a tensor
    dtype: torch.dtype | None
    channel_dim: int | None  # None: not known
    live: bool  # computed from the block's inputs
    additions: int  # of two equal shapes, whatever they were computed from
    ops: tuple[Op, ...]  # what ran in it, inside children too


@dataclass(frozen=True)
class TracedForward:
    """The forward of one block in one mode (eval or train) as a graph.

    ``facts`` is of the first recorded call; ``calls`` has one mapping for each call.
    """

    graph: fx.Graph
    facts: Mapping[fx.Node, NodeFacts]
    calls: tuple[Mapping[fx.Node, NodeFacts], ...]


@dataclass(frozen=True)
class TracedBlock:
    """A module that adds maps in its own forward.

    ``train`` is ``eval`` unless the forward itself reads ``self.training``.
    """

    name: str
    eval: TracedForward
    train: TracedForward
    additions: int  # of two equal shapes that its own forward ran, in one call


@dataclass(frozen=True)
class UntracedBlock:
    """A module that adds maps in its own forward, in a way that fx cannot follow."""

    name: str
    why: str
    additions: tuple[Shape, ...]


@dataclass(frozen=True)
class Trace:
    """All blocks of a model that add maps, in the order in which they first ran."""

    blocks: tuple[TracedBlock | UntracedBlock, ...]
    stopped: str | None  # why the forward did not come to its end, where it did not
    example: Arguments  # what the forward was given, on meta


def trace_blocks(model: nn.Module, example_input: Any = None) -> Trace:
    """Record one forward of ``model`` on meta tensors and trace the blocks that add maps.

    Args:
        model: any module; it is neither run nor changed.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes
            and dtypes matter. By default [2, 3, 224, 224], or what a timm model's
            ``pretrained_cfg`` says, and a few other sizes where the forward rejects that.

    Raises:
        ForwardError: the forward failed before its end, for another reason than that it needs
            values where meta tensors have none.
    """
    twin = meta_copy(model)
    recording = _record_any(twin, example_inputs(model, example_input))
    modules = dict(twin.named_modules())
    traced: dict[Hashable, tuple[TracedForward, TracedForward] | str] = {}
    blocks: list[TracedBlock | UntracedBlock] = []
    for name, calls in recording.calls.items():
        module = modules[name]
        key = (_configuration(module), tuple(call.signature for call in calls))
        if key not in traced:
            traced[key] = _trace_block(module, calls)
        result = traced[key]
        if isinstance(result, str):
            additions = tuple(shape for shape in calls[0].additions)
            blocks.append(UntracedBlock(name, result, additions))
        else:
            blocks.append(TracedBlock(name, *result, additions=len(calls[0].additions)))
    return Trace(tuple(blocks), recording.stopped, recording.example)


# --- record ------------------------------------------------------------------------------------


@dataclass
class Call:
    """One recorded call of a module, and the shapes that its own forward added."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    additions: list[Shape] = field(default_factory=list)

    @functools.cached_property
    def signature(self) -> Hashable:
        """Equal for calls that a graph cannot tell apart."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        return (
            str(spec),
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
    example: Arguments


class _Recorder(TorchFunctionMode):
    """Attributes each addition of two equal shapes to the innermost module that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = {}
        self.running: list[tuple[str, Call]] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(
                functools.partial(self._enter, name), prepend=True, with_kwargs=True
            )
            module.register_forward_hook(self._leave)

    def _enter(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        call = Call(*_rebuilt(args, kwargs))
        self.calls.setdefault(name, []).append(call)
        self.running.append((name, call))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.running and (shape := adds_equal_shapes(func, args, kwargs)) is not None:
            self.running[-1][1].additions.append(shape)
        return run_on_meta(func, args, kwargs)


def _rebuilt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The same tensors in new containers: HRNet's modules write into the list they are given."""
    if any(isinstance(value, list | dict) for value in (*args, *kwargs.values())):
        args, kwargs = pytree.tree_map(lambda leaf: leaf, (args, kwargs))
    return args, kwargs


def _record_any(twin: nn.Module, examples: Sequence[Arguments]) -> Recording:
    """Record with the first example that the forward accepts."""
    first_error: ForwardError | None = None
    for args, kwargs in examples:
        try:
            return _record(twin, args, kwargs)
        except ForwardError as error:
            first_error = first_error or error
    assert first_error is not None
    raise first_error


def _record(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    _remove_hooks(twin)  # those of an earlier attempt
    recorder = _Recorder(twin)
    stopped = None
    try:
        with torch.no_grad(), torch.device("meta"), recorder:
            twin(*args, **kwargs)
    except Exception as error:  # whatever a foreign forward may raise
        where = recorder.running[-1][0] if recorder.running else ""
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if not _needs_values(error):
            raise ForwardError(
                f"the forward of {block_label(where)} failed on an input of shape"
                f" {_describe_input(args, kwargs)}: {reason}\n"
                "Pass example_input= (on the command line --img-size, --in-chans) as the model"
                " expects it."
            ) from error
        stopped = f"{block_label(where)} needs values, which meta tensors have not ({reason})"
    finally:
        _remove_hooks(twin)
    calls = {
        name: calls
        for name, calls in recorder.calls.items()
        if any(call.additions for call in calls)
    }
    return Recording(calls, stopped, (args, kwargs))


def _needs_values(error: Exception) -> bool:
    """Whether a forward stopped because meta tensors hold no data (``nonzero`` in a detector)."""
    return isinstance(error, NotImplementedError | RuntimeError) and "meta" in str(error).lower()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode whose tensors are all on meta, without the user's hooks.

    Hooks of ``torch.nn.utils`` (weight norm, spectral norm) belong to the model and stay.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = _to_meta(tensor)
        for value in vars(module).values():
            if isinstance(value, Tensor):
                memo[id(value)] = _to_meta(value)
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever a foreign __deepcopy__ may raise
        raise ForwardError(
            f"copy.deepcopy of the model fails ({type(error).__name__}: {_first_line(error)});"
            " se_inject plans on a copy. Remove what cannot be copied from the modules first."
        ) from error
    _remove_hooks(twin)
    return twin.eval()


def _to_meta(tensor: Tensor) -> Tensor:
    meta = tensor.detach().to("meta")
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _remove_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]


def example_inputs(model: nn.Module, example_input: Any = None) -> list[Arguments]:
    """The (args, kwargs) to try in turn, on meta: the user's, or those that fit most networks."""
    dtype = _floating_dtype(model)
    if example_input is not None:
        on_meta = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), example_input)
        if isinstance(on_meta, Mapping):
            return [((), dict(on_meta))]
        return [(on_meta if isinstance(on_meta, tuple) else (on_meta,), {})]
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    channels = [size[0] if size else 3]
    first_conv = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first_conv is not None and first_conv.in_channels not in channels:
        channels.append(first_conv.in_channels)
    # A hand-written network for small images flattens to a fixed size and rejects 224 pixels.
    sides = [tuple(size[1:])] if size else [(s, s) for s in (224, 32, 64, 28, 96, 128, 256, 512)]
    # Two images, so that a batch norm in train mode has more than one value for a 1x1 map.
    return [
        ((torch.empty(2, c, *hw, dtype=dtype, device="meta"),), {}) for hw in sides for c in channels
    ]


def _floating_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def block_label(name: str) -> str:
    """The name of a block as users read it; the root module has the empty name."""
    return f"'{name}'" if name else "the model itself"


def _describe_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return ", ".join(str(list(t.shape)) for t in leaves) or "no tensor"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


# --- trace -------------------------------------------------------------------------------------


class _InPlaceProxy(fx.Proxy):
    """A proxy that keeps ``x += y`` in place; fx's own would turn it into ``x = x + y``."""


def _in_place(op: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return method


for _op in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_InPlaceProxy, f"__{_op.__name__}__", _in_place(_op))


_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn")
_FACTORIES += ("randperm", "tensor", "zeros")


class BlockTracer(fx.Tracer):
    """Traces one module's own forward for one recorded call; every child is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace; tensors that the forward makes are made anew in every call of the graph.

        fx itself cannot see ``torch.rand(x.shape[0], 1, 1, 1)`` and would freeze ``torch.ones(1)``.
        """
        with contextlib.ExitStack() as stack:
            for name in _FACTORIES:
                stack.enter_context(
                    unittest.mock.patch.object(torch, name, self._recorded(getattr(torch, name)))
                )
            return super().trace(root, concrete_args)

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            return self.create_proxy("call_function", function, args, kwargs)

        return record

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder a parameter, named and defaulted as in the source.

        Unlike fx's own, this keeps the signature when an argument is a list of tensors (the
        placeholder is indexed), so the new forward is called as the old one was.
        """
        positional: list[Any] = [self.root]
        keyword: dict[str, Any] = {}
        parameters = inspect.signature(root_fn).parameters
        for name, value in bind(root_fn, self.root, self.call).items():
            parameter = parameters[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                proxy = self.create_proxy("placeholder", f"*{name}", (), {})
                positional += [self._stand_in(proxy[i], v, name) for i, v in enumerate(value)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                proxy = self.create_proxy("placeholder", f"**{name}", (), {})
                keyword |= {k: self._stand_in(proxy[k], v, name) for k, v in value.items()}
            else:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                proxy = self.create_proxy("placeholder", name, default, {})
                stand_in = self._stand_in(proxy, value, name)
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keyword[name] = stand_in
                else:
                    positional.append(stand_in)
        return lambda: root_fn(*positional, **keyword), []

    def _stand_in(self, proxy: fx.Proxy, value: Any, name: str) -> Any:
        """What the forward sees in place of ``value``: a proxy, or the value where Python asks it.

        Flags and absent arguments decide which way the code goes, so they are made concrete, and
        the graph checks them; numbers and sizes stay symbolic, so that other sizes work too.
        """
        if isinstance(value, list | tuple) and _holds_tensor(value):
            items = [self._stand_in(proxy[i], v, name) for i, v in enumerate(value)]
            return type(value)(items) if type(value) in (list, tuple) else tuple(items)
        if isinstance(value, dict) and _holds_tensor(value):
            return type(value)((k, self._stand_in(proxy[k], v, name)) for k, v in value.items())
        if value is None or isinstance(value, bool | str):
            self.create_proxy("call_function", expect, (proxy, value, name), {})
            return value
        if isinstance(value, Tensor | int | float) or _is_size(value):
            return proxy
        return value


def expect(value: Any, recorded: Any, argument: str) -> None:
    """Stop a call that would need another path through the forward than the recorded one."""
    if value is not recorded and value != recorded:
        raise RuntimeError(
            f"argument {argument!r} was {recorded!r} when the SE block was inserted; this block"
            f" now serves no other value. remove_se(model) brings back its own forward."
        )


def bind(forward: Callable[..., Any], module: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a recorded call by parameter name, defaults filled in."""
    bound = inspect.signature(forward).bind(module, *call.args, **call.kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value)


def _trace_block(
    module: nn.Module, calls: Sequence[Call]
) -> tuple[TracedForward, TracedForward] | str:
    """The eval and train graphs of a block, or in words why there are none."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if len({_flags(module, call) for call in calls}) > 1:
        return "it is called with different flags in one forward"
    try:
        eval_graph = BlockTracer(calls[0]).trace(module)
        module.train()
        train_graph = BlockTracer(calls[0]).trace(module)
    except Exception as error:  # fx runs foreign Python on proxies: anything may come
        return f"fx cannot follow its forward ({type(error).__name__}: {_first_line(error)})"
    finally:
        module.eval()
    try:
        evaluated = _run(module, eval_graph, calls)
        if str(train_graph) == str(eval_graph):
            return evaluated, evaluated
        module.train()
        return evaluated, _run(module, train_graph, calls)
    except _OtherNetwork as error:
        return str(error)
    except Exception as error:
        return f"its graph does not run ({type(error).__name__}: {_first_line(error)})"
    finally:
        module.eval()


def _flags(module: nn.Module, call: Call) -> Hashable:
    arguments = bind(type(module).forward, module, call)
    return tuple((name, repr(v)) for name, v in arguments.items() if not _holds_tensor(v))


class _OtherNetwork(Exception):
    """The graph does not do what the forward does."""


def _run(module: nn.Module, graph: fx.Graph, calls: Sequence[Call]) -> TracedForward:
    """Run the graph on each recorded call, and the forward itself, and compare what ran."""
    for node in graph.nodes:
        if node.op == "get_attr" and "_tensor_constant" in str(node.target):
            return _fail("its forward makes a tensor that fx would freeze into the graph")
    by_signature: dict[Hashable, Mapping[fx.Node, NodeFacts]] = {}
    for call in calls:
        if call.signature not in by_signature:
            by_signature[call.signature] = _facts(module, graph, call)
    all_calls = tuple(by_signature[call.signature] for call in calls)
    return TracedForward(graph, all_calls[0], all_calls)


def _fail(why: str) -> Any:
    raise _OtherNetwork(why)


def _facts(module: nn.Module, graph: fx.Graph, call: Call) -> Mapping[fx.Node, NodeFacts]:
    with torch.no_grad(), torch.device("meta"):
        own = OpLog(pytree.tree_leaves((call.args, call.kwargs)))
        args, kwargs = _rebuilt(call.args, call.kwargs)
        with own:
            type(module).forward(module, *args, **kwargs)
        log = OpLog(pytree.tree_leaves((call.args, call.kwargs)))
        interpreter = _FactFinder(module, graph, log, call)
        with log:
            interpreter.run()
    if own.ops != log.ops:
        _fail("fx follows another path through its forward than Python does")
    return interpreter.facts


class _FactFinder(fx.Interpreter):
    """Runs a block graph on meta and notes what each node computes."""

    def __init__(self, module: nn.Module, graph: fx.Graph, log: OpLog, call: Call) -> None:
        super().__init__(module, graph=graph)
        self.arguments = bind(type(module).forward, module, call)
        self.log = log
        self.facts: dict[fx.Node, NodeFacts] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target).lstrip("*")]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # fx hands out immutable lists; the generated code will not, and HRNet writes into them.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {k: _mutable(v) for k, v in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        start, additions = len(self.log.ops), self.log.additions
        value = super().run_node(n)
        is_tensor = isinstance(value, Tensor)
        inputs = [self.env[i] for i in n.all_input_nodes if i in self.env]
        self.log.ensure_followed(value, inputs)
        self.facts[n] = NodeFacts(
            shape=tuple(value.shape) if is_tensor else None,
            dtype=value.dtype if is_tensor else None,
            channel_dim=self.log.channel_dim(value) if is_tensor else None,
            live=any(self.log.is_live(leaf) for leaf in pytree.tree_leaves(value)),
            additions=self.log.additions - additions,
            ops=tuple(self.log.ops[start:]),
        )
        return value


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(v) for v in value]
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    return value


# --- equal blocks are traced once --------------------------------------------------------------

_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def _configuration(module: nn.Module) -> Hashable:
    """Equal only for modules that trace to the same graph on the same call."""
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple(
            (name, _hashable(value))
            for name, value in vars(module).items()
            if name not in _MODULE_INTERNALS
        ),
        tuple((name, None if t is None else (tuple(t.shape), t.dtype)) for name, t in tensors),
        tuple(
            (name, None if child is None else _configuration(child))
            for name, child in module._modules.items()
        ),
    )


def _hashable(value: Any) -> Hashable:
    """The value itself where equality means sameness, else its identity (shares nothing)."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | enum.Enum):
        return (type(value), value)
    if isinstance(value, type) or inspect.isroutine(value) and not inspect.ismethod(value):
        return value
    if isinstance(value, functools.partial):
        return (value.func, _hashable(value.args), _hashable(value.keywords))
    if isinstance(value, tuple | list):
        return (type(value), tuple(_hashable(v) for v in value))
    if isinstance(value, dict | OrderedDict):
        return (type(value), tuple((k, _hashable(v)) for k, v in value.items()))
    return id(value)
