"""Recorded calls -> one ``torch.fx`` graph per block that adds maps, shapes on its nodes.

Each module that adds two tensors of one shape in its own forward is traced alone, every child a
leaf. The graph is then run on the recorded arguments, and what each node computes (its shape,
which dim holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs, operation by operation, what the module's own forward runs:
``torch.fx`` follows one path through Python without a word where a proxy is not what the code
expects (``isinstance(x, Tensor)``), and such a graph would be another network.
"""

import contextlib
import pickle
import random
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.utils.checkpoint
from torch import fx, nn

from se_inject.errors import first_line
from se_inject.graph.example import example_inputs
from se_inject.graph.facts import TracedForward, run_graph
from se_inject.graph.log import Value
from se_inject.graph.meta import LOCK, meta_copy
from se_inject.graph.record import Arguments, Call, Shape, changed, record, state_of
from se_inject.graph.same import configuration
from se_inject.graph.tracer import (
    BlockTracer,
    OtherNetworkError,
    _holds_tensor,
    _is_symbolic,
    bind,
)


@dataclass(frozen=True)
class TracedBlock:
    """A module that adds maps in its own forward.

    ``train`` is ``eval`` unless the forward itself reads ``self.training``.
    """

    name: str
    eval: TracedForward
    train: TracedForward
    adders: frozenset[str] = frozenset()  # children that only add what they are given
    # Where the tensors of each recorded call came from; None: the forward was not followed.
    pasts: tuple[tuple[Value | None, ...], ...] | None = None


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
        key = (configuration(module), tuple(call.signature for call in calls))
        if key not in traced:
            traced[key] = _trace_block(name, module, calls)
        result = traced[key]
        if isinstance(result, str):
            additions = max((call.additions for call in calls), key=len)
            blocks.append(UntracedBlock(name, result, tuple(additions)))
        else:
            pasts = tuple(call.past for call in calls if call.past is not None)
            adders = frozenset[str]().union(*(call.adders for call in calls))
            blocks.append(TracedBlock(name, *result, adders, pasts or None))
    return Trace(tuple(blocks), recording.stopped, recording.guessed, recording.example)


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
                raise OtherNetworkError("its forward draws random numbers outside torch")
    except OtherNetworkError as error:
        return str(error)
    except Exception as error:  # fx runs foreign Python on proxies: anything may come
        return f"fx cannot follow its forward ({type(error).__name__}: {first_line(error)})"
    try:
        evaluated = run_graph(module, eval_graph, calls)
        if train_graph is eval_graph:
            return evaluated, evaluated
        module.train()
        return evaluated, run_graph(module, train_graph, calls)
    except OtherNetworkError as error:
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
        raise OtherNetworkError("its forward reads the mode of a child")
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
            raise OtherNetworkError(f"its forward sets self.{sets[0]}")
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


# --- equal blocks are traced once --------------------------------------------------------------
