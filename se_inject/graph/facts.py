"""Finds out what each node of a block graph computes in the recorded calls."""

import contextlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from se_inject.graph.containers import leaves, rebuilt
from se_inject.graph.expect import bind
from se_inject.graph.meta import on_meta
from se_inject.graph.operations.log import OpLog
from se_inject.graph.operations.ops import Op
from se_inject.graph.operations.value import Value
from se_inject.graph.recording.call import Call, Shape
from se_inject.graph.recording.replay import Replay
from se_inject.graph.source import ForwardSource
from se_inject.graph.thread import THREAD, OtherNetworkError
from se_inject.torch_private import pytree, storage_id, version_of, without_torch_functions


@dataclass(frozen=True)
class NodeFacts:
    """What one node of a block graph computed in a recorded call."""

    shape: Shape | None  # None if it is not a tensor
    dtype: torch.dtype | None
    channel_dim: int | None  # None if it is not known
    live: bool  # whether it was computed from the block's inputs
    storage: int | None  # equal for tensors that share memory
    writes: frozenset[int]  # the storages that the node changes in place
    ops: tuple[Op, ...]  # the operations of the node, including those inside children
    value: Value | None  # its content and where that is from; None if it is not a live tensor


@dataclass(frozen=True)
class TracedForward:
    """The forward of one block in one mode (eval or train) as a graph."""

    graph: fx.Graph
    calls: tuple[Mapping[fx.Node, NodeFacts], ...]  # the facts of each recorded call
    # Whether the graph returns the same types as the forward (fx turns an OrderedDict into a dict),
    # and leaves the same objects in the lists and dicts that it is given.
    returns_same: bool


def run_graph(
    module: nn.Module, graph: fx.Graph, calls: Sequence[Call], device: torch.device | None = None
) -> TracedForward:
    """Run the graph and the forward itself on each recorded call, and compare what ran."""
    by_signature: dict[Hashable, Mapping[fx.Node, NodeFacts]] = {}
    returns_same = True
    for call in calls:
        if call.signature not in by_signature:
            facts, same = _facts(module, graph, call, device)
            by_signature[call.signature] = facts
            returns_same = returns_same and same
    facts_of_calls = tuple(by_signature[call.signature] for call in calls)
    return TracedForward(graph, facts_of_calls, returns_same)


def _facts(
    module: nn.Module, graph: fx.Graph, call: Call, device: torch.device | None
) -> tuple[Mapping[fx.Node, NodeFacts], bool]:
    """What the nodes compute, and whether the graph returns what the forward returns."""
    generated = ForwardSource.of(graph, "check").compile(show=False)
    ops, returned = [], []
    with on_meta(device):
        for forward in (type(module).forward, generated):
            args, kwargs = given = rebuilt((call.args, call.kwargs))
            before = pytree.tree_leaves(given)
            with call.log() as log, _replayed(Replay(module, call, log)):
                output = forward(module, *args, **kwargs)
            ops.append(log.ops)
            after = pytree.tree_leaves(given)
            kept = [a is b for a, b in zip(before, after, strict=False)]
            structures = pytree.tree_structure(output), pytree.tree_structure(given)
            returned.append((structures, _leaf_types(output), kept))
        finder = _FactFinder(module, graph, call.log(), call)
        with finder.log:
            finder.run()
            finder.finish()
    if ops[0] != ops[1]:
        raise OtherNetworkError("its graph does not run what its forward runs")
    return finder.facts, returned[0] == returned[1]


@contextlib.contextmanager
def _replayed(replay: Replay) -> Iterator[None]:
    THREAD.replay = replay
    try:
        yield
    finally:
        THREAD.replay = None


def _leaf_types(value: Any) -> list[type]:
    return [type(leaf) for leaf in pytree.tree_leaves(value)]


class _FactFinder(fx.Interpreter):
    """Runs a block graph on meta and notes what each node computes."""

    def __init__(self, module: nn.Module, graph: fx.Graph, log: OpLog, call: Call) -> None:
        super().__init__(module, graph=graph)
        self.arguments = bind(type(module).forward, module, call)
        self.log = log
        self.facts: dict[fx.Node, NodeFacts] = {}
        self.made: dict[fx.Node, Tensor] = {}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.arguments[str(target).lstrip("*")]

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        # fx hands out immutable lists. The generated code does not, and HRNet writes into lists.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {k: _mutable(v) for k, v in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        start = len(self.log.ops)
        self.log.maker = n
        inputs = [self.env[i] for i in n.all_input_nodes if i in self.env]
        with without_torch_functions():
            tensors = [t for t in leaves(inputs) if isinstance(t, Tensor) and not t.is_inference()]
            before = [(t, version_of(t)) for t in tensors]
        value = super().run_node(n)
        with without_torch_functions():
            self._note(n, inputs, before, self.log.ops[start:], value)
        return value

    def _note(
        self, n: fx.Node, inputs: list[Any], before: list[Any], ops: list[Op], value: Any
    ) -> None:
        is_tensor = isinstance(value, Tensor)
        if is_tensor:
            self.made[n] = value
        self.log.ensure_followed(value, inputs)
        self.facts[n] = NodeFacts(
            shape=tuple(value.shape) if is_tensor else None,
            dtype=value.dtype if is_tensor else None,
            channel_dim=self.log.channel_dim(value) if is_tensor else None,
            live=any(self.log.is_live(leaf) for leaf in pytree.tree_leaves(value)),
            storage=storage_id(value) if is_tensor else None,
            writes=frozenset(
                storage_id(t) for t, version in before if version_of(t) != version or self._drops(n)
            ),
            ops=tuple(ops),
            value=self.log.value_of(value) if is_tensor else None,
        )

    def finish(self) -> None:
        """Also count what a tensor got after it was made, such as a map written into zeros."""
        for node, tensor in self.made.items():
            value = self.log.value_of(tensor)
            if self.facts[node].value is None and value is not None:
                dim = self.log.channel_dim(tensor)
                self.facts[node] = replace(
                    self.facts[node], value=value, live=True, channel_dim=dim
                )

    def _drops(self, n: fx.Node) -> bool:
        """Whether the node is a dropout in place, which writes in train mode only."""
        child = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        return isinstance(child, nn.modules.dropout._DropoutNd) and child.inplace


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(v) for v in value]
    if isinstance(value, dict):
        return {k: _mutable(v) for k, v in value.items()}
    return value
