"""Recorded calls -> one ``torch.fx`` graph per block that adds maps, shapes on its nodes.

Each module that adds two tensors of one shape in its own forward is traced alone, every child a
leaf. The graph is then run on the recorded arguments, and what each node computes (its shape,
which dim holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs, operation by operation, what the module's own forward runs:
``torch.fx`` follows one path through Python without a word where a proxy is not what the code
expects (``isinstance(x, Tensor)``), and such a graph would be another network.
"""

import contextlib
import enum
import functools
import inspect
import operator
import pickle
import random
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from se_inject.edit.block_class import ForwardSource
from se_inject.errors import first_line
from se_inject.graph.meta import LOCK, meta_copy, on_meta, replaced
from se_inject.graph.ops import Op, OpLog, leaves
from se_inject.graph.record import (
    Arguments,
    Call,
    Shape,
    changed,
    example_inputs,
    rebuilt,
    record,
    state_of,
)


@dataclass(frozen=True)
class NodeFacts:
    """What one node of a block graph computed on a recorded call."""

    shape: Shape | None  # None: not a tensor
    dtype: torch.dtype | None
    channel_dim: int | None  # None: not known
    live: bool  # computed from the block's inputs
    storage: int | None  # equal for tensors that share memory
    writes: frozenset[int]  # the storages that it changes in place
    ops: tuple[Op, ...]  # what ran in it, inside children too


@dataclass(frozen=True)
class TracedForward:
    """The forward of one block in one mode (eval or train) as a graph."""

    graph: fx.Graph
    calls: tuple[Mapping[fx.Node, NodeFacts], ...]  # the facts of each recorded call
    returns_same: bool  # the types of its outputs too: fx turns an OrderedDict into a dict


@dataclass(frozen=True)
class TracedBlock:
    """A module that adds maps in its own forward.

    ``train`` is ``eval`` unless the forward itself reads ``self.training``.
    """

    name: str
    eval: TracedForward
    train: TracedForward


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
    guessed: tuple[str, ...]  # modules whose way depends on values, which meta tensors have not
    example: Arguments  # what the forward was given, on meta


def trace_blocks(model: nn.Module, example_input: Any = None, *, follow: bool = False) -> Trace:
    """Record one forward of ``model`` on meta tensors and trace the blocks that add maps.

    Args:
        model: any module; it is neither run nor changed.
        example_input: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes
            and dtypes matter. By default [2, 3, 224, 224], or what a timm model's
            ``pretrained_cfg`` says, and a few other sizes where the forward rejects that.
        follow: know the channel dims of block inputs from the blocks before; takes longer, and is
            needed only where a block itself does not show them.

    Raises:
        ForwardError: the forward failed before its end, for another reason than that it needs
            values where meta tensors have none.
    """
    # Tensors of inference mode do not say when they are changed in place.
    with LOCK, _foreign_random_numbers(), torch.inference_mode(False):
        return _trace_blocks(model, example_input, follow)


def _trace_blocks(model: nn.Module, example_input: Any, follow: bool) -> Trace:
    twin = meta_copy(model)
    recording = record(twin, example_inputs(model, example_input), follow=follow)
    modules = dict(twin.named_modules())
    traced: dict[Hashable, tuple[TracedForward, TracedForward] | str] = {}
    blocks: list[TracedBlock | UntracedBlock] = []
    for name, calls in recording.calls.items():
        module = modules[name]
        key = (_configuration(module), tuple(call.signature for call in calls))
        if key not in traced:
            traced[key] = _trace_block(name, module, calls)
        result = traced[key]
        if isinstance(result, str):
            additions = max((call.additions for call in calls), key=len)
            blocks.append(UntracedBlock(name, result, tuple(additions)))
        else:
            blocks.append(TracedBlock(name, *result))
    return Trace(tuple(blocks), recording.stopped, recording.guessed, recording.example)


class _InPlaceProxy(fx.Proxy):
    """A proxy that keeps ``x += y`` in place; fx's own would turn it into ``x = x + y``."""


def _in_place(op: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: _InPlaceProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", op, (self, other), {})

    return method


for _op in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_InPlaceProxy, f"__{_op.__name__}__", _in_place(_op))


_FACTORIES: tuple[str, ...] = ("arange", "empty", "eye", "full", "linspace", "ones", "rand")
_FACTORIES += ("randint", "randn", "randperm", "tensor", "zeros")


def _refusing(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """``function``, but an error in the thread that traces."""
    tracing_thread = threading.get_ident()

    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == tracing_thread:
            raise _OtherNetworkError(f"its forward {what}")
        return function(*args, **kwargs)

    return refuse


class _OtherNetworkError(Exception):
    """The graph would not do what the forward does."""


class BlockTracer(fx.Tracer):
    """Traces one module's own forward for one recorded call; every child is a leaf."""

    proxy_buffer_attributes = True

    def __init__(self, name: str, call: Call) -> None:
        # A checkpointed part becomes an argument that fx refuses; inlined, it would be no longer.
        super().__init__(autowrap_functions=(torch.utils.checkpoint.checkpoint,))
        self.name = name
        self.call = call
        self.children = {child: iter(calls) for child, calls in call.children.items()}
        self.grad_mode = torch.is_grad_enabled()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace; tensors that the forward makes are made anew in every call of the graph.

        fx itself cannot see ``torch.rand(x.shape[0], 1, 1, 1)`` and would freeze ``torch.ones(1)``;
        and it would drop without a word what a graph cannot say: autocast regions, and the
        backward of an ``autograd.Function``.
        """
        with contextlib.ExitStack() as stack:
            for name in _FACTORIES:
                stack.enter_context(replaced(torch, name, self._recorded(getattr(torch, name))))
            for name in ("__init__", "__enter__"):  # one that decorates a function is made before
                enter = _refusing(vars(torch.autocast)[name], "enters autocast")
                stack.enter_context(replaced(torch.autocast, name, enter))
            checkpoint = _refusing(torch.utils.checkpoint.checkpoint, "is checkpointed")
            stack.enter_context(replaced(torch.utils.checkpoint, "checkpoint", checkpoint))
            apply = vars(torch.autograd.Function)["apply"]
            call = _refusing(
                lambda cls, *args, **kwargs: apply.__get__(None, cls)(*args, **kwargs),
                "calls an autograd.Function",
            )
            stack.enter_context(replaced(torch.autograd.Function, "apply", classmethod(call)))
            graph = super().trace(root, concrete_args)
        if any("_tensor_constant" in str(n.target) for n in graph.nodes if n.op == "get_attr"):
            raise _OtherNetworkError("its forward makes a tensor that fx would freeze")
        return graph

    def _recorded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        tracing_thread = threading.get_ident()

        @functools.wraps(function)
        def record(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != tracing_thread:  # a data loader's, say
                return function(*args, **kwargs)
            return self.create_proxy("call_function", function, args, kwargs)

        return record

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_grad_enabled() != self.grad_mode:
            raise _OtherNetworkError("its forward switches gradients on or off")
        return super().create_node(*args, **kwargs)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """A child's output: a proxy, or a container of proxies where the child returned one."""
        proxy = super().call_module(m, forward, args, kwargs)
        name = f"{self.name}.{self.path_of_module(m)}".lstrip(".")
        call = next(self.children.get(name, iter(())), None)
        if call is None:
            return proxy

        def leaf(proxy: Any, value: Any) -> Any:
            # Names beside the tensors (of a pyramid's levels) are what the code iterates over.
            return value if value is None or isinstance(value, str | list) else proxy

        return _unpacked(proxy, call.output, leaf)

    def create_arg(self, a: Any) -> Any:
        # The code of a graph is what its arguments print: np.float64(0.5) is no name there.
        return super().create_arg(a.item() if isinstance(a, numpy.generic) else a)

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
                proxy: Any = self.create_proxy("placeholder", f"*{name}", (), {})
                self._expect_length(proxy, value, name)
                positional += [self._argument(proxy[i], v, name) for i, v in enumerate(value)]
            elif parameter.kind is parameter.VAR_KEYWORD:
                proxy = self.create_proxy("placeholder", f"**{name}", (), {})
                self._expect_length(proxy, value, name)
                keyword |= {k: self._argument(proxy[k], v, name) for k, v in value.items()}
            else:
                default = () if parameter.default is parameter.empty else (parameter.default,)
                proxy = self.create_proxy("placeholder", name, default, {})
                stand_in = self._argument(proxy, value, name)
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keyword[name] = stand_in
                else:
                    positional.append(stand_in)
        return lambda: root_fn(*positional, **keyword), []

    def _argument(self, proxy: Any, value: Any, name: str) -> Any:
        """What the forward sees in place of an argument: a proxy, or the value if Python asks it.

        Flags and absent arguments decide which way the code goes, so they are made concrete, and
        the graph checks them; numbers and sizes stay symbolic, so that other sizes work too.
        """

        def leaf(proxy: Any, value: Any) -> Any:
            if value is None or isinstance(value, bool | str):
                self.create_proxy("call_function", expect, (proxy, value, name), {})
                return value
            if isinstance(value, Tensor) or _is_symbolic(value):
                return proxy
            raise _OtherNetworkError(
                f"its argument {name!r} is a {type(value).__name__}, which may decide its way"
            )

        if isinstance(value, list | tuple | dict) and _holds_tensor(value):
            self._expect_length(proxy, value, name)
        return _unpacked(proxy, value, leaf)

    def _expect_length(self, proxy: Any, value: Any, name: str) -> None:
        length = self.create_proxy("call_function", len, (proxy,), {})
        self.create_proxy("call_function", expect, (length, len(value), f"len({name})"), {})


def _unpacked(proxy: Any, value: Any, leaf: Callable[[Any, Any], Any]) -> Any:
    """A container of tensors with each item of it read from the proxy; else ``leaf``."""
    if isinstance(value, list | tuple) and _holds_tensor(value):
        items = [_unpacked(proxy[i], v, leaf) for i, v in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict) and _holds_tensor(value):
        return type(value)((k, _unpacked(proxy[k], v, leaf)) for k, v in value.items())
    return leaf(proxy, value)


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


def _is_symbolic(value: Any) -> bool:
    """A number, or a size made of numbers: it may differ from call to call."""
    if isinstance(value, tuple | list):
        return all(map(_is_symbolic, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _trace_block(
    name: str, module: nn.Module, calls: Sequence[Call]
) -> tuple[TracedForward, TracedForward] | str:
    """The eval and train graphs of a block, or in words why there are none."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if isinstance(module, fx.GraphModule):
        # Copying one, or recompiling it, would silently bring back its own graph.
        return "it is a GraphModule: inject into the model that it was traced from"
    if sets := [name for call in calls for name in call.sets]:
        return f"its forward sets self.{sets[0]}"
    if len({_flags(module, call) for call in calls}) > 1:
        return "it is called with different flags in one forward"
    try:
        with _unchanged(module), _foreign_random_numbers() as drawn:
            eval_graph, train_graph = _graphs(name, module, calls[0])
            if drawn():  # a graph would freeze one draw
                raise _OtherNetworkError("its forward draws random numbers outside torch")
    except _OtherNetworkError as error:
        return str(error)
    except Exception as error:  # fx runs foreign Python on proxies: anything may come
        return f"fx cannot follow its forward ({type(error).__name__}: {first_line(error)})"
    try:
        evaluated = _run(module, eval_graph, calls)
        if train_graph is eval_graph:
            return evaluated, evaluated
        module.train()
        return evaluated, _run(module, train_graph, calls)
    except _OtherNetworkError as error:
        return str(error)
    except Exception as error:
        return f"its graph does not run ({type(error).__name__}: {first_line(error)})"
    finally:
        module.eval()


def _graphs(name: str, module: nn.Module, call: Call) -> tuple[fx.Graph, fx.Graph]:
    """The graphs in eval and train mode; one object if the forward reads no mode."""
    with _mode_reads() as readers:
        in_eval = BlockTracer(name, call).trace(module)
        if not readers:
            return in_eval, in_eval
        module.train()
        in_train = BlockTracer(name, call).trace(module)
    if any(reader is not module for reader in readers):
        raise _OtherNetworkError("its forward reads the mode of a child")
    return in_eval, in_train


@contextlib.contextmanager
def _mode_reads() -> Iterator[list[nn.Module]]:
    """Collects the modules whose ``training`` is read, by a property that stands before it."""
    readers: list[nn.Module] = []
    tracing_thread = threading.get_ident()

    def read(module: nn.Module) -> Any:
        if threading.get_ident() == tracing_thread:
            readers.append(module)
        return vars(module)["training"]

    def write(module: nn.Module, value: bool) -> None:
        vars(module)["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment]  # for a moment
    try:
        yield readers
    finally:
        del nn.Module.training


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward set on its module (proxies), and refuse such a forward."""
    inner: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    attributes, contents = dict(vars(module)), [dict(d) for d in inner]
    before = state_of(module)
    try:
        yield
        module.eval()
        # fx's own constants are found, and refused, in the graph.
        sets = [n for n in changed(before, state_of(module)) if "_tensor_constant" not in n]
        if sets:
            raise _OtherNetworkError(f"its forward sets self.{sets[0]}")
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        for own, content in zip(inner, contents, strict=True):
            own.clear()
            own.update(content)
        module.eval()


@contextlib.contextmanager
def _foreign_random_numbers() -> Iterator[Callable[[], bool]]:
    """Puts back the random states of Python and NumPy; yields whether any number was drawn."""
    before, of_numpy = random.getstate(), _numpy_state()
    try:
        yield lambda: random.getstate() != before or _numpy_state() != of_numpy
    finally:
        random.setstate(before)
        numpy.random.set_state(pickle.loads(of_numpy))


def _numpy_state() -> bytes:
    return pickle.dumps(numpy.random.get_state())


def _flags(module: nn.Module, call: Call) -> Hashable:
    """The arguments of a call that decide the way through the forward."""
    arguments = bind(type(module).forward, module, call)
    return tuple(
        (name, None if _holds_tensor(v) or _is_symbolic(v) else repr(v), _holds_tensor(v))
        for name, v in arguments.items()
    )


def _run(module: nn.Module, graph: fx.Graph, calls: Sequence[Call]) -> TracedForward:
    """Run the graph on each recorded call, and the forward itself, and compare what ran."""
    by_signature: dict[Hashable, Mapping[fx.Node, NodeFacts]] = {}
    returns_same = True
    for call in calls:
        if call.signature not in by_signature:
            facts, same = _facts(module, graph, call)
            by_signature[call.signature] = facts
            returns_same = returns_same and same
    facts_of_calls = tuple(by_signature[call.signature] for call in calls)
    return TracedForward(graph, facts_of_calls, returns_same)


def _facts(
    module: nn.Module, graph: fx.Graph, call: Call
) -> tuple[Mapping[fx.Node, NodeFacts], bool]:
    """What the nodes compute, and whether the outputs have the types that the forward's have."""
    generated = ForwardSource.of(graph, "check").compile(show=False)
    ops, returned = [], []
    with on_meta():
        for forward in (type(module).forward, generated):
            args, kwargs = rebuilt((call.args, call.kwargs))
            with call.log() as log:
                output = forward(module, *args, **kwargs)
            ops.append(log.ops)
            returned.append((pytree.tree_structure(output), _leaf_types(output)))
        finder = _FactFinder(module, graph, call.log(), call)
        with finder.log:
            finder.run()
    if ops[0] != ops[1]:
        raise _OtherNetworkError("fx follows another path through its forward than Python does")
    return finder.facts, returned[0] == returned[1]


def _leaf_types(value: Any) -> list[type]:
    return [type(leaf) for leaf in pytree.tree_leaves(value)]


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
        start = len(self.log.ops)
        inputs = [self.env[i] for i in n.all_input_nodes if i in self.env]
        tensors = [t for t in leaves(inputs) if isinstance(t, Tensor) and not t.is_inference()]
        before = [(t, t._version) for t in tensors]
        value = super().run_node(n)
        is_tensor = isinstance(value, Tensor)
        self.log.ensure_followed(value, inputs)
        self.facts[n] = NodeFacts(
            shape=tuple(value.shape) if is_tensor else None,
            dtype=value.dtype if is_tensor else None,
            channel_dim=self.log.channel_dim(value) if is_tensor else None,
            live=any(self.log.is_live(leaf) for leaf in pytree.tree_leaves(value)),
            storage=_storage(value) if is_tensor else None,
            writes=frozenset(
                _storage(t) for t, version in before if t._version != version or self._drops(n)
            ),
            ops=tuple(self.log.ops[start:]),
        )
        return value

    def _drops(self, n: fx.Node) -> bool:
        """Whether it is a dropout in place, which writes in train mode only."""
        child = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        return isinstance(child, nn.modules.dropout._DropoutNd) and child.inplace


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(v) for v in value]
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    return value


# --- equal blocks are traced once --------------------------------------------------------------

_MODULE_INTERNALS = frozenset(vars(nn.Module()))


def _configuration(module: nn.Module, seen: dict[int, int] | None = None) -> Hashable:
    """Equal only for modules that trace to the same graph on the same call.

    ``seen`` numbers modules and tensors in the order in which they come up: where two names are
    one object in one block and two in another, the blocks are not alike.
    """
    seen = {} if seen is None else seen
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = len(seen)
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        type(module),
        tuple(
            (name, _hashable(value))
            for name, value in vars(module).items()
            if name not in _MODULE_INTERNALS
        ),
        tuple(
            (name, t if t is None else (*t.shape, t.dtype, seen.setdefault(id(t), len(seen))))
            for name, t in tensors
        ),
        tuple(
            (name, None if child is None else _configuration(child, seen))
            for name, child in module._modules.items()
        ),
    )


def _hashable(value: Any) -> Hashable:
    """The value itself where equality means sameness, else its identity (shares nothing)."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | enum.Enum):
        return (type(value), value)
    if isinstance(value, type) or (inspect.isroutine(value) and not inspect.ismethod(value)):
        return value
    if isinstance(value, functools.partial):
        return (value.func, _hashable(value.args), _hashable(value.keywords))
    if isinstance(value, tuple | list):
        return (type(value), tuple(_hashable(v) for v in value))
    if isinstance(value, dict):
        return (type(value), tuple((k, _hashable(v)) for k, v in value.items()))
    return id(value)
