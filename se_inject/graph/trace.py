"""Recorded calls -> one ``torch.fx`` graph per block that adds maps, shapes on its nodes.

Each module that adds two tensors of one shape in its own forward is traced alone, every child a
leaf. The graph is then run on the recorded arguments, and what each node computes (its shape,
which dim holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs, operation by operation, what the module's own forward runs:
``torch.fx`` follows one path through Python without a word where a proxy is not what the code
expects (``isinstance(x, Tensor)``), and such a graph would be another network.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import fx, nn

from se_inject.errors import ForwardError, first_line
from se_inject.graph.example import example_inputs
from se_inject.graph.expect import bind
from se_inject.graph.facts import TracedForward, run_graph
from se_inject.graph.held import changed_in, held_by
from se_inject.graph.log import Value, tensors_in
from se_inject.graph.meta import copy_with_twins, device_of, hooks_of, on_meta
from se_inject.graph.patches import run_replaced
from se_inject.graph.planning import (
    THREAD,
    OtherNetworkError,
    place_of_error,
    raise_interruption,
    replacements,
)
from se_inject.graph.record import Arguments, Call, Shape, changed, rebuilt, record, state_of
from se_inject.graph.same import configuration
from se_inject.graph.thread_state import ForeignRandomNumbers, ThreadState
from se_inject.graph.tracer import BlockTracer, holds_tensor, is_symbolic
from se_inject.layers.layout import first_convolution

_T = TypeVar("_T")


@dataclass(frozen=True)
class TracedBlock:
    """A module that adds maps in its own forward.

    ``train`` is ``eval`` unless the forward itself reads ``self.training``.
    """

    name: str
    eval: TracedForward
    train: TracedForward
    example: Arguments  # of its first recorded call, on meta
    adders: frozenset[str] = frozenset()  # children that only add what they are given
    # Where the tensors of each recorded call came from; None: the forward was not followed.
    pasts: tuple[tuple[Value | None, ...], ...] | None = None


@dataclass(frozen=True)
class UntracedBlock:
    """A module that adds maps in its own forward, in a way that no graph can say."""

    name: str
    why: str
    additions: tuple[Shape, ...]
    looks_residual: bool  # it convolves, and adds maps of the shape that it takes or returns
    gated: bool = False  # a map is gated before the last of the additions


@dataclass(frozen=True)
class Trace:
    """All blocks of a model that add maps, in the order in which they first ran."""

    blocks: tuple[TracedBlock | UntracedBlock, ...]
    stopped: str | None  # why the forward did not come to its end, where it did not
    missed: tuple[str, ...]  # modules that could hold a block and did not run to their end then
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

    def work(twin: nn.Module, device: torch.device) -> Trace:
        return _trace_twin(twin, example_inputs(model, example_input), device, follow)

    try:
        return on_a_copy(model, work)
    except ForwardError as error:
        if not _has_hooks(model):
            raise
        try:  # a forward may need what a hook of its own has captured
            return on_a_copy(model, work, hooks=True)
        except ForwardError:
            raise error from None


def on_a_copy(
    model: nn.Module, work: Callable[[nn.Module, torch.device], _T], *, hooks: bool = False
) -> _T:
    """Do something with a copy of the model on meta, while this thread sees what planning replaces.

    Args:
        model: it is neither run nor changed, and no random number is drawn.
        work: what is to be done with the copy, and with the device that the model is on.
        hooks: whether the copy has the user's hooks too.
    """

    def plan() -> _T:
        # Tensors of inference mode do not say when they are changed in place.
        with torch.inference_mode(False):
            twin, modules_of_copy, tensors_of_copy = copy_with_twins(model, hooks=hooks)
            THREAD.modules, THREAD.tensors = modules_of_copy, tensors_of_copy
            return work(twin, device_of(model))

    state, of_planning = ThreadState(), dict(vars(THREAD))

    def put_back() -> None:
        vars(THREAD).clear()
        vars(THREAD).update(of_planning)
        state.put_back()

    return run_replaced(replacements, plan, put_back)


def _has_hooks(model: nn.Module) -> bool:
    return any(any(hooks_of(module)) for module in model.modules())


def _trace_twin(
    twin: nn.Module, examples: Sequence[Arguments], device: torch.device, follow: bool
) -> Trace:
    recording = record(twin, examples, device, follow=follow)
    modules = dict(twin.named_modules())
    traced: dict[Hashable, tuple[TracedForward, TracedForward] | str] = {}
    blocks: list[TracedBlock | UntracedBlock] = []
    for name, calls in recording.calls.items():
        module = modules[name]
        key = (configuration(module), tuple(call.signature for call in calls))
        if key not in traced:
            traced[key] = trace_block(name, module, calls, device)
        result = traced[key]
        if isinstance(result, str):
            additions = max((call.additions for call in calls), key=len)
            shapes = {
                tuple(tensor.shape)
                for call in calls
                for tensor in tensors_in((call.args, call.kwargs, call.output))
            }
            convolves = first_convolution(module) is not None
            looks_residual = convolves and not shapes.isdisjoint(additions)
            gated = _gates_before_addition(module, calls[0], device)
            blocks.append(UntracedBlock(name, result, tuple(additions), looks_residual, gated))
        else:
            pasts = tuple(call.past for call in calls if call.past is not None)
            adders = frozenset[str]().union(*(call.adders for call in calls))
            first = (calls[0].args, calls[0].kwargs)
            blocks.append(TracedBlock(name, *result, first, adders, pasts or None))
    return Trace(
        tuple(blocks),
        recording.stopped,
        recording.missed,
        recording.guessed,
        recording.example,
    )


def trace_block(
    name: str, module: nn.Module, calls: Sequence[Call], device: torch.device
) -> tuple[TracedForward, TracedForward] | str:
    """The eval and train graphs of a block, or in words why there are none."""
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if not callable(getattr(type(module), "forward", None)):
        return "its forward is no function of its class"
    if isinstance(module, fx.GraphModule):
        # Copying one, or recompiling it, would silently bring back its own graph.
        return "it is a GraphModule: inject into the model that it was traced from"
    if sets := [name for call in calls for name in call.sets]:
        return f"its forward sets self.{sets[0]}"
    if len({_flags(module, call) for call in calls}) > 1:
        return "it is called with different flags in one forward"
    try:
        with _unchanged(module), ForeignRandomNumbers() as numbers:
            eval_graph, train_graph = _graphs(name, module, calls[0], device)
            if numbers.drawn():  # a graph would freeze one draw
                raise OtherNetworkError("its forward draws random numbers outside torch")
    except OtherNetworkError as error:
        return str(error)
    except Exception as error:  # foreign Python runs on recorded values: anything may come
        raise_interruption(error)
        what = f"{type(error).__name__}: {first_line(error)}"
        if any(kind in what for kind in ("'Int'", "not Int", "Scalar", "Machine", "Shape")):
            what = "it hands a size or a property of a tensor to code that takes plain numbers"
        return f"its forward cannot be followed{place_of_error(error)}: {what}"
    try:
        evaluated = run_graph(module, eval_graph, calls, device)
        if train_graph is eval_graph:
            return evaluated, evaluated
        module.train()
        return evaluated, run_graph(module, train_graph, calls, device)
    except OtherNetworkError as error:
        return str(error)
    except Exception as error:
        raise_interruption(error)
        return f"its graph does not run ({type(error).__name__}: {first_line(error)})"
    finally:
        module.eval()


def _gates_before_addition(module: nn.Module, call: Call, device: torch.device) -> bool:
    """Whether the forward, run as it is, gates a map and adds maps after that."""
    args, kwargs = rebuilt((call.args, call.kwargs))
    try:
        with on_meta(device), call.log() as log:
            module(*args, **kwargs)
    except Exception as error:  # a foreign forward
        raise_interruption(error)
    gates = [i for i, op in enumerate(log.ops) if op.gates]
    additions = [i for i, op in enumerate(log.ops) if op.adds_maps]
    return bool(gates and additions) and gates[0] < additions[-1]


def _graphs(
    name: str, module: nn.Module, call: Call, device: torch.device
) -> tuple[fx.Graph, fx.Graph]:
    """The graphs in eval and train mode; one object if the forward reads no mode."""
    own = {id(m) for m in module.modules()}

    def trace() -> tuple[fx.Graph, list[nn.Module]]:
        tracer, held = BlockTracer(name, call), held_by(module)
        with on_meta(device):
            graph = tracer.trace(module)
        if changes := changed_in(held, held_by(module)):
            raise OtherNetworkError(f"its forward changes what self.{changes} holds")
        # A layer that the forward itself has made is in the mode in which it was made.
        return graph, [m for m in tracer.mode_readers if id(m) in own]

    in_eval, readers = trace()
    if not readers:
        return in_eval, in_eval
    module.train()
    in_train, more = trace()
    if any(reader is not module for reader in (*readers, *more)):
        raise OtherNetworkError("its forward reads the mode of a child")
    return in_eval, in_train


@contextlib.contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what a traced forward set on its module (proxies), and refuse such a forward."""
    inner: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    attributes, contents = dict(vars(module)), [dict(d) for d in inner]
    before = state_of(module)
    try:
        yield
        module.eval()
        if sets := changed(before, state_of(module)):
            raise OtherNetworkError(f"its forward sets self.{sets[0]}")
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        for own, content in zip(inner, contents, strict=True):
            own.clear()
            own.update(content)
        module.eval()


def _flags(module: nn.Module, call: Call) -> Hashable:
    """The arguments of a call that decide the way through the forward."""
    arguments = bind(type(module).forward, module, call)
    return tuple(
        (name, None if holds_tensor(v) or is_symbolic(v) else repr(v), holds_tensor(v))
        for name, v in arguments.items()
    )


# --- equal blocks are traced once --------------------------------------------------------------
