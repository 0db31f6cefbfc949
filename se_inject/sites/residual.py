"""Block graph -> residual sites; reads only.

A residual site is an addition ``out = F(x) + shortcut(x)`` of two maps of one shape, where the
branch F passes at least one convolution and the shortcut is the identity or a short projection.
The SE block goes on the branch, after its last convolution and norm and before stochastic depth,
layer scale and skip gain, or where another placement of the paper has it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import fx, nn

from se_inject.graph.ops import Op
from se_inject.graph.record import Shape
from se_inject.graph.trace import NodeFacts
from se_inject.layers.squeeze_excite import Layout
from se_inject.layers.variant import Placement


class Reason(StrEnum):
    """Why an addition gets no SE block."""

    GATED = "the branch already has channel attention"
    REPARAMETERISABLE = "re-parameterisable sum"
    FUSION = "fusion, not residual (neither operand is a shortcut)"
    NO_CONVOLUTION = "no convolution on the branch"
    TOKENS = "tokens, not a feature map"
    NO_MAP = "more than five dims or not real numbers, no feature map"
    WIDTHS = "called with different numbers of channels"
    INNER = "inside the branch of another residual addition"
    SCALED = "scaled addition (alpha is not 1)"
    LAYOUT = "se_layer takes [N, C, H, W], and this map has another layout"
    CHANNELS_UNKNOWN = "cannot tell which dim holds the channels"
    SHARED_IN_PLACE = "changes in place a map that is read again"
    SEVERAL_INPUTS = "pre: the branch reads several maps"
    NO_SPATIAL = "3x3: no spatial convolution on the branch"
    SIDE_BY_SIDE = "3x3: the branch's last spatial convolution sees a part of it only"
    CONVOLUTION_INSIDE = "3x3: a child has the spatial convolution and another one behind it"
    HIDDEN = "inside a function that fx does not enter"
    UNTRACED = "cannot be traced"
    MODES_DIFFER = "train and eval mode add different maps"
    INJECTED = "has an SE block of se_inject already"
    EXCLUDED = "excluded by the user"
    NOT_REACHED = "not reached by the recorded forward"


@dataclass(frozen=True)
class ResidualSite:
    """Where in a block graph an SE block goes."""

    addition: fx.Node
    source: fx.Node  # the map to scale: the SE block reads it
    readers: tuple[fx.Node, ...]  # what reads the scaled map in its place
    shortcut: fx.Node  # the operand of the addition that is not the branch
    fused: bool  # the addition alone reads the branch: the SE block takes it over
    shortcut_first: bool  # the sum has the memory format of its first operand
    in_place: bool  # and keeps its dtype too
    channels: int
    layout: Layout
    dtype: torch.dtype
    shapes: tuple[Shape, ...]  # of the branch map, one a recorded call


@dataclass(frozen=True)
class Rejection:
    """An addition of two maps that is no site."""

    addition: fx.Node
    reason: Reason


def find_sites(
    graph: fx.Graph,
    calls: Sequence[Mapping[fx.Node, NodeFacts]],
    module: nn.Module,
    placement: Placement = "standard",
) -> tuple[list[ResidualSite], list[Rejection]]:
    """The residual sites of one block graph, and every other addition of two maps.

    Args:
        graph: the block's own forward, every child a leaf.
        calls: what each node computed, one mapping a recorded call.
        module: the block; only asked whether it has a method that folds its convolutions.
        placement: where at a residual addition the SE block goes; which additions are residual is
            the same for all.
    """
    flow = _Flow(graph, calls[0])
    additions = [n for n in graph.nodes if flow.addition(n) is not None]
    shapes = {n: _shape_verdict(flow, module, n) for n in additions}
    for node in additions:
        # ``x + a(x) + b(x)``: neither addition has the whole branch on one side.
        for part in flow.operands(node):
            inner = shapes.get(part)
            same_fork = isinstance(inner, _Residual) and inner.fork is flow.dominator[node]
            if same_fork and shapes[node] is Reason.FUSION:
                shapes[part] = Reason.FUSION
    residuals = {n: r for n in additions if isinstance(r := shapes[n], _Residual)}
    sites: list[ResidualSite] = []
    rejected: list[Rejection] = []
    for node in additions:
        shape = shapes[node]
        verdict = (
            _site(flow, calls, node, additions, residuals, placement)
            if isinstance(shape, _Residual)
            else shape
        )
        if isinstance(verdict, ResidualSite):
            sites.append(verdict)
        else:
            rejected.append(Rejection(node, verdict))
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and flow.addition(node) is None:
            inside = sum(op.adds_maps for op in calls[0][node].ops)
            rejected += [Rejection(node, Reason.HIDDEN)] * inside
    return sites, rejected


# --- data flow ---------------------------------------------------------------------------------


class _Flow:
    """The data flow of a block graph: nodes computed from its inputs, and their dominators."""

    def __init__(self, graph: fx.Graph, facts: Mapping[fx.Node, NodeFacts]) -> None:
        self.facts = facts
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        # Immediate dominators; None is the common root of all block inputs.
        self.dominator: dict[fx.Node, fx.Node | None] = {}
        for node in graph.nodes:
            if node.op == "output":
                continue
            if not facts[node].live:
                continue
            self.inputs[node] = [i for i in node.all_input_nodes if i in self.dominator]
            if node.op == "placeholder":
                self.dominator[node] = None
            elif self.inputs[node]:
                common: fx.Node | None = self.inputs[node][0]
                for other in self.inputs[node][1:]:
                    common = self.meet(common, other)
                self.dominator[node] = common

    def meet(self, a: fx.Node | None, b: fx.Node | None) -> fx.Node | None:
        """The nearest node that dominates both; None for the block inputs together."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.order[a] > self.order[b]:
                a = self.dominator[a]
            else:
                b = self.dominator[b]
        return a

    def dominates(self, a: fx.Node, b: fx.Node | None) -> bool:
        """Whether every path from the block inputs to ``b`` passes ``a``."""
        while b is not None and b is not a:
            b = self.dominator[b]
        return b is a

    def between(self, fork: fx.Node | None, end: fx.Node) -> list[fx.Node]:
        """The nodes on the paths from the fork (left out) to ``end`` (included)."""
        seen: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node is not fork and node not in seen:
                seen.add(node)
                stack += self.inputs[node]
        return sorted(seen, key=self.order.__getitem__)

    def ops(self, nodes: Sequence[fx.Node]) -> Iterator[Op]:
        for node in nodes:
            yield from self.facts[node].ops

    def depth(self, fork: fx.Node | None, end: fx.Node) -> int:
        """Most convolutions and Linears that a path from the fork to ``end`` passes."""
        deepest: dict[fx.Node, int] = {}
        for node in self.between(fork, end):
            before = max((deepest.get(i, 0) for i in self.inputs[node]), default=0)
            deepest[node] = before + sum(op.adds_depth for op in self.facts[node].ops)
        return deepest.get(end, 0)

    def read_again(self, step: fx.Node) -> bool:
        """Whether the tensor that an in-place step changes is read later by another name."""
        changed = step.args[0]
        assert isinstance(changed, fx.Node)
        storage = self.facts[changed].storage
        return any(
            self.order[user] > self.order[step]
            for node, facts in self.facts.items()
            if facts.storage == storage and self.order[node] < self.order[step]
            for user in node.users
        )

    def separable(self, source: fx.Node, readers: Sequence[fx.Node]) -> bool:
        """Whether the readers can be given a tensor of their own in place of ``source``.

        What they change in place from then on, nobody else may read, and not the caller, where the
        tensor is the caller's. What others change is lost on them, and on the backward pass: the SE
        block keeps its input for that.
        """
        storage = self.facts[source].storage
        aliases = [n for n, facts in self.facts.items() if facts.storage == storage]
        first = min(aliases, key=self.order.__getitem__)
        is_callers = not self.facts[first].ops  # nothing in this block has made it
        start = min(self.order[reader] for reader in readers)
        moved: set[fx.Node] = set()
        steps: list[tuple[bool, bool]] = []  # reads the old tensor; writes the old or the new
        for node in self.order:
            if self.order[node] < start or node not in self.facts:
                continue
            reads = [i for i in node.all_input_nodes if i in aliases or i in moved]
            new = [i for i in reads if i in moved or (i is source and node in readers)]
            facts = self.facts[node]
            if new and is_callers and node.op == "output":
                return False  # the caller may go on with its own tensor by two names
            if new and facts.storage in (storage, None):  # a view, or a container of it
                moved.add(node)
            steps.append((len(new) < len(reads), storage in facts.writes))
        return not any(
            writes and (is_callers or any(old for old, _ in steps[i:]))
            for i, (_, writes) in enumerate(steps)
        )

    def next_step(
        self, node: fx.Node, wanted: Callable[[Sequence[Op]], bool], *, permuted: bool = False
    ) -> fx.Node | None:
        """The step that follows, if it is a wanted one; over identities (and permutations)."""
        while len(node.users) == 1:
            (node,) = node.users
            if len(self.inputs.get(node, ())) != 1 or self.facts[node].shape is None:
                return None
            ops = self.facts[node].ops
            if ops and wanted(ops):
                return node
            if not all(permuted and op.is_permutation for op in ops):
                return None
        return None

    def keeps_fork(self, fork: fx.Node | None, end: fx.Node) -> bool:
        """Whether a term of ``end`` is the fork itself, through no convolution or Linear.

        Where paths are added or concatenated, all must pass one; where they are multiplied, a
        gate that is computed from the fork leaves nothing of it in the product.
        """
        kept: dict[fx.Node, bool] = {}
        for node in self.between(fork, end):
            ops = self.facts[node].ops
            inputs = [kept.get(i, True) for i in self.inputs[node]] or [True]
            joined = any(op.joins for op in ops)
            kept[node] = not any(op.adds_depth for op in ops) and (
                any(inputs) if joined else all(inputs)
            )
        return kept.get(end, True)

    def joins_after(self, node: fx.Node) -> set[fx.Node]:
        """The concatenations that ``node`` flows into without passing another addition."""
        found: set[fx.Node] = set()
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if user not in self.inputs or self.addition(user) is not None:
                continue
            if user.op == "call_function" and any(op.joins for op in self.facts[user].ops):
                found.add(user)
            stack += user.users
        return found

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        addition = self.addition(node)
        assert addition is not None
        return addition[:2]

    def addition(self, node: fx.Node) -> tuple[fx.Node, fx.Node, Op] | None:
        """The operands, if the node itself adds two maps computed from the inputs."""
        if node.op not in ("call_function", "call_method"):
            return None
        op = next((op for op in self.facts[node].ops if op.adds_maps), None)
        named = [node.kwargs[k] for k in ("input", "other") if k in node.kwargs]
        a, b = [*node.args[:2], *named, None, None][:2]
        if op is None or len(self.facts[node].ops) != 1 or "out" in node.kwargs:
            return None
        return (a, b, op) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


# --- the shape of the flow: branch and shortcut ------------------------------------------------


@dataclass(frozen=True)
class _Residual:
    """An addition that has the shape of a residual one."""

    fork: fx.Node | None
    branch: fx.Node
    shortcut: fx.Node


def _shape_verdict(flow: _Flow, module: nn.Module, node: fx.Node) -> _Residual | Reason:
    addition = flow.addition(node)
    assert addition is not None
    a, b, op = addition
    if op.alpha != 1:
        return Reason.SCALED
    if len(op.shape) not in (4, 5):
        return Reason.TOKENS if len(op.shape) == 3 else Reason.NO_MAP
    if a not in flow.dominator or b not in flow.dominator:
        return Reason.FUSION  # kept on an attribute since another module ran
    fork = flow.meet(a, b)
    if _collapses(module, flow.ops([*flow.between(fork, a), *flow.between(fork, b)])):
        return Reason.REPARAMETERISABLE
    depth = {n: flow.depth(fork, n) for n in (a, b)}
    branch, shortcut = (a, b) if depth[a] >= depth[b] else (b, a)
    if not any(op.is_convolution for op in flow.ops(flow.between(fork, branch))):
        return Reason.NO_CONVOLUTION
    if depth[branch] == depth[shortcut] or not _is_shortcut(flow, fork, shortcut):
        return Reason.FUSION
    if flow.keeps_fork(fork, branch):
        return Reason.FUSION  # a part of the sum is the shortcut: the SE block would scale it
    return _Residual(fork, branch, shortcut)


def _is_shortcut(flow: _Flow, fork: fx.Node | None, end: fx.Node) -> bool:
    """The identity, or a straight path of at most two convolutions; pooling and norm allowed."""
    path = flow.between(fork, end)
    ops = list(flow.ops(path))
    straight = all(len(flow.inputs[n]) <= 1 for n in path) and not any(op.joins for op in ops)
    short = sum(op.is_convolution for op in ops) <= 2
    # A shortcut that the caller computed (DLA) comes as it is; two inputs that are both
    # convolved or resampled before they are added are fused (feature pyramids, NASNet's cells).
    given = fork is not None or not ops
    return straight and short and given


# Of timm, of the RepVGG and MobileOne repositories, and of Ultralytics.
_COLLAPSING_METHODS: tuple[str, ...] = ("reparameterize", "fuse", "switch_to_deploy", "fuse_convs")
_COLLAPSING_METHODS += ("get_equivalent_kernel_bias", "repvgg_convert", "fuse_repvgg_block")


def _collapses(module: nn.Module, ops: Iterator[Op]) -> bool:
    """Whether the module can fold itself into one convolution, and both paths are linear."""
    foldable = any(callable(getattr(module, name, None)) for name in _COLLAPSING_METHODS)
    return foldable and all(op.is_linear_in_map for op in ops)


# --- from a residual addition to a site --------------------------------------------------------


def _site(
    flow: _Flow,
    calls: Sequence[Mapping[fx.Node, NodeFacts]],
    node: fx.Node,
    additions: Sequence[fx.Node],
    residuals: Mapping[fx.Node, _Residual],
    placement: Placement,
) -> ResidualSite | Reason:
    residual = residuals[node]
    path = flow.between(residual.fork, residual.branch)
    if any(_is_inner(flow, node, residual, outer, residuals[outer]) for outer in residuals):
        return Reason.INNER
    if any(_is_sibling(flow, node, residual, sum_node) for sum_node in additions):
        return Reason.FUSION
    if any(op.gates for op in flow.ops(path)):
        return Reason.GATED
    point = _POINTS[placement](flow, node, residual)
    if isinstance(point, Reason):
        return point
    facts = flow.facts[point.source]
    if facts.shape is None or facts.dtype is None or not facts.dtype.is_floating_point:
        return Reason.NO_MAP
    if len(facts.shape) not in (4, 5):
        return Reason.TOKENS if len(facts.shape) == 3 else Reason.NO_MAP
    channel_dim = _channel_dim(flow, point)
    if channel_dim not in (1, len(facts.shape) - 1):
        return Reason.CHANNELS_UNKNOWN
    shapes = tuple(shape for call in calls if (shape := call[point.source].shape) is not None)
    if len({shape[channel_dim] for shape in shapes}) > 1:
        return Reason.WIDTHS
    return ResidualSite(
        addition=node,
        source=point.source,
        readers=point.readers,
        shortcut=residual.shortcut,
        fused=point.fused,
        shortcut_first=flow.operands(node)[0] is residual.shortcut,
        in_place=_is_in_place(node),
        channels=facts.shape[channel_dim],
        layout=Layout(len(facts.shape), channel_dim),
        dtype=facts.dtype,
        shapes=shapes,
    )


def _is_inner(
    flow: _Flow,
    node: fx.Node,
    residual: _Residual,
    outer_node: fx.Node,
    outer: _Residual,
) -> bool:
    """Whether an addition is a part of another's branch rather than a residual unit in it.

    Units in a row under a long skip (a network in one forward) stay sites of their own: the
    whole branch passes each of them. Res2Net's inner additions see a part of the channels only,
    and in ``a + b + x`` the first sum has the fork of the second and nothing follows it.
    """
    if outer_node is node or node not in flow.between(outer.fork, outer.branch):
        return False
    if not flow.dominates(node, outer.branch):
        return True
    after = flow.between(node, outer.branch)
    return residual.fork is outer.fork and not any(op.is_convolution for op in flow.ops(after))


def _is_sibling(flow: _Flow, node: fx.Node, residual: _Residual, other: fx.Node) -> bool:
    """Whether the cell computes ``other`` beside ``node`` from the same fork and joins both.

    NASNet's cells concatenate five such sums: none of them is the trunk of the network.
    """
    if node in flow.between(None, other) or other in flow.between(None, node):
        return False
    from_fork = residual.fork is None or residual.fork in flow.between(None, other)
    return from_fork and bool(flow.joins_after(node) & flow.joins_after(other))


# --- where the SE block goes -------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """The map that the SE block reads, and what reads its output in place of the map."""

    source: fx.Node
    readers: tuple[fx.Node, ...]
    alike: tuple[fx.Node, ...] = ()  # maps whose dims are those of the source
    fused: bool = False


def _before_addition(flow: _Flow, node: fx.Node, residual: _Residual) -> _Point | Reason:
    """standard: on the branch, before stochastic depth, dropout, layer scale and gains."""
    reader, *chain = _tail(flow, node, residual)
    branch = chain[0]
    # ``x += F(x)`` changes the caller's x; only the addition itself can go on doing so.
    mutates_shortcut = _is_in_place(node) and node.args[0] is residual.shortcut
    for step in {node, reader}:
        # Who reads ``out`` after ``out += x`` reads the sum; after the SE block it would not.
        if _is_in_place(step) and step.args[0] in chain and flow.read_again(step):
            return Reason.SHARED_IN_PLACE
    # What stands between branch and addition moves no dim.
    fused = reader is node and not mutates_shortcut
    return _Point(branch, (reader,), (residual.shortcut,), fused)


def _tail(flow: _Flow, node: fx.Node, residual: _Residual) -> list[fx.Node]:
    """What reads the branch map, the branch map itself, and what only drops or scales it."""
    reader, chain = node, [residual.branch]
    while _is_tail(flow, chain[0]):
        reader = chain[0]
        chain = [flow.inputs[reader][0], *chain]
    return [reader, *chain]


def _on_branch_input(flow: _Flow, node: fx.Node, residual: _Residual) -> _Point | Reason:
    """pre: on what the branch reads; the shortcut reads the map as it was."""
    path = flow.between(residual.fork, residual.branch)
    source = residual.fork
    if source is None:  # the shortcut is another argument of the block
        entries = [n for n in path if not flow.inputs[n]]
        if len(entries) != 1:
            return Reason.SEVERAL_INPUTS
        source = entries[0]
    readers = [user for user in source.users if user in path]
    while flow.facts[source].shape is None and len(readers) == 1:  # a list of maps, say
        source = readers[0]
        readers = [user for user in source.users if user in path]
    if flow.facts[source].shape is None:
        return Reason.SEVERAL_INPUTS
    alike = (residual.branch,) if source is residual.shortcut else ()
    return _separate(flow, _Point(source, tuple(readers), alike))


def _after_addition(flow: _Flow, node: fx.Node, residual: _Residual) -> _Point | Reason:
    """post: behind the addition and, where one follows, its activation."""
    source = flow.next_step(node, _is_activation) or node
    return _separate(
        flow, _Point(source, tuple(source.users), (residual.branch, residual.shortcut))
    )


def _on_shortcut(flow: _Flow, node: fx.Node, residual: _Residual) -> _Point | Reason:
    """identity: on the operand of the addition that is not the branch."""
    return _separate(flow, _Point(residual.shortcut, (node,), (residual.branch,)))


def _after_spatial_convolution(flow: _Flow, node: fx.Node, residual: _Residual) -> _Point | Reason:
    """3x3: behind the branch's last spatial convolution and its norm.

    Behind the activation too, where the convolution is depthwise: there MobileNetV3 and
    EfficientNet have it.
    """
    path = flow.between(residual.fork, residual.branch)
    spatial = [n for n in path if any(op.is_spatial_convolution for op in flow.facts[n].ops)]
    if not spatial:
        return Reason.NO_SPATIAL
    source = spatial[-1]
    if not flow.dominates(source, residual.branch):
        return Reason.SIDE_BY_SIDE
    ops = flow.facts[source].ops
    last = max(i for i, op in enumerate(ops) if op.is_spatial_convolution)
    if any(op.adds_depth for op in ops[last + 1 :]):
        return Reason.CONVOLUTION_INSIDE
    if not _is_norm(ops[last + 1 :]):
        source = flow.next_step(source, _is_norm, permuted=True) or source
    if ops[last].is_depthwise and not any(op.is_activation for op in flow.facts[source].ops):
        source = flow.next_step(source, _is_activation) or source
    _, end, *_ = _tail(flow, node, residual)
    if source is end or source not in flow.between(residual.fork, end):
        return _before_addition(flow, node, residual)
    return _separate(flow, _Point(source, tuple(source.users)))


_POINTS: dict[Placement, Callable[[_Flow, fx.Node, _Residual], _Point | Reason]] = {
    "standard": _before_addition,
    "pre": _on_branch_input,
    "post": _after_addition,
    "identity": _on_shortcut,
    "3x3": _after_spatial_convolution,
}


def _separate(flow: _Flow, point: _Point) -> _Point | Reason:
    """The point, unless the copy that the SE block makes would be seen."""
    if not point.readers or not flow.separable(point.source, point.readers):
        return Reason.SHARED_IN_PLACE
    return point


def _is_norm(ops: Sequence[Op]) -> bool:
    """Begins as a norm (an activation with a gain ends as one), perhaps with an activation."""
    first = next((op for op in ops if not op.is_permutation), None)
    plain = not any(op.adds_depth or op.joins for op in ops)
    return plain and first is not None and first.is_affine


def _is_activation(ops: Sequence[Op]) -> bool:
    """Alone, or made of products (``x * sigmoid(x)``, a gain)."""
    named = any(op.is_activation for op in ops)
    return named and all(op.is_activation or op.is_product for op in ops)


def _channel_dim(flow: _Flow, point: _Point) -> int | None:
    """Of the source: known there, or from maps like it, or from the layer that reads it."""
    for node in (point.source, *point.alike):
        if (known := flow.facts[node].channel_dim) is not None:
            return known
    for reader in point.source.users:
        ops = flow.facts[reader].ops if reader in flow.facts else ()
        if ops and ops[0].reads_channels_first and reader.all_input_nodes == [point.source]:
            return 1
    return None


def _is_tail(flow: _Flow, node: fx.Node) -> bool:
    """Whether a node only drops or scales its one input, and so belongs behind the SE block."""
    if node.op == "placeholder" or len(flow.inputs[node]) != 1:
        return False
    (source,) = flow.inputs[node]
    facts = flow.facts[node]
    same = facts.shape is not None and facts.shape == flow.facts[source].shape
    return same and all(op.is_dropout or op.scales for op in facts.ops)


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("iadd", "imul", "isub", "itruediv") or (
        node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    )
