"""Recorded calls -> one ``torch.fx`` graph for each block that adds maps, with facts on its nodes.

Each module that adds two tensors of one shape in its own forward is traced alone, with every child
as a leaf. The graph is then run on the recorded arguments. What each node computes (its shape,
which dim holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs the same operations in the same order as the module's own forward.
Where a proxy is not what the code expects (``isinstance(x, Tensor)``), ``torch.fx`` silently
follows one path through Python, and such a graph would be another network.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from se_inject.errors import ForwardError
from se_inject.graph.containers import tensors_in
from se_inject.graph.copies import copy_with_twins, hooks_of
from se_inject.graph.example import example_inputs
from se_inject.graph.facts import TracedForward
from se_inject.graph.meta import device_of
from se_inject.graph.operations.value import Value
from se_inject.graph.recording.call import Arguments, Shape
from se_inject.graph.recording.record import record
from se_inject.graph.same import configuration
from se_inject.graph.thread import THREAD
from se_inject.graph.thread_state import ThreadState
from se_inject.graph.tracing.block import trace_block
from se_inject.graph.tracing.patches import run_replaced
from se_inject.graph.tracing.replaced import replacements
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
    example: Arguments  # the arguments of its first recorded call, on meta
    adders: frozenset[str] = frozenset()  # the children that only add their inputs
    # Where the tensors of each recorded call came from. None if the forward was not followed.
    pasts: tuple[tuple[Value | None, ...], ...] | None = None


@dataclass(frozen=True)
class UntracedBlock:
    """A module that adds maps in its own forward, in a way that no graph can express."""

    name: str
    why: str
    additions: tuple[Shape, ...]
    looks_residual: bool  # it convolves, and adds maps of the shape that it takes or returns
    # Which of the additions have a gate on one operand. None if the forward was not followed.
    gated: tuple[bool, ...] | None = None


@dataclass(frozen=True)
class Trace:
    """All blocks of a model that add maps, in the order in which they first ran."""

    blocks: tuple[TracedBlock | UntracedBlock, ...]
    stopped: str | None  # why the forward did not come to its end, if it did not
    missed: tuple[str, ...]  # modules that may hold a block and then did not run to their end
    guessed: tuple[str, ...]  # modules whose path depends on values, which meta tensors lack
    example: Arguments  # the arguments of the forward, on meta


def trace_blocks(model: nn.Module, example_input: Any = None, *, follow: bool = False) -> Trace:
    """Record one forward of ``model`` on meta tensors and trace the blocks that add maps.

    Args:
        model: any module. It is neither run nor changed.
        example_input: a tensor, a tuple of positional arguments or a dict of keyword arguments.
            Only shapes and dtypes matter. The default is the size in the ``pretrained_cfg`` of a
            timm model, or else [2, 3, 224, 224] for images, and then a few other sizes.
        follow: whether to find out the channel dims of a block's inputs from the blocks before it.
            This takes longer, and is needed only if the block itself does not show them.

    Raises:
        ForwardError: the forward failed before its end, and not because it needs values that meta
            tensors do not have.
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
    """Do something with a copy of the model on meta, with the replacements for planning in place.

    Args:
        model: any module. It is neither run nor changed, and no random number is drawn.
        work: what to do. It gets the copy, and the device that the model is on.
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
            longest = max(calls, key=lambda call: len(call.additions))
            additions = longest.additions
            shapes = {
                tuple(tensor.shape)
                for call in calls
                for tensor in tensors_in((call.args, call.kwargs, call.output))
            }
            convolves = first_convolution(module) is not None
            looks_residual = convolves and not shapes.isdisjoint(additions)
            gated = tuple(added.is_gated for added in longest.sums) if follow else None
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
