"""Recorded calls -> one ``torch.fx`` graph per block that adds maps, shapes on its nodes.

Each module that adds two tensors of one shape in its own forward is traced alone, every child a
leaf. The graph is then run on the recorded arguments, and what each node computes (its shape,
which dim holds the channels, what ran inside a child) goes into :class:`NodeFacts`.

A graph is kept only if it runs, operation by operation, what the module's own forward runs:
``torch.fx`` follows one path through Python without a word where a proxy is not what the code
expects (``isinstance(x, Tensor)``), and such a graph would be another network.
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
    # Which of the additions have a gate on one of their operands; None: it was not followed.
    gated: tuple[bool, ...] | None = None


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
