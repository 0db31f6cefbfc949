"""The data flow of a block graph: what is computed from the inputs, dominators, depth."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import fx

from se_inject.graph.facts import NodeFacts
from se_inject.graph.ops import Op


class Flow:
    """The data flow of a block graph: nodes computed from its inputs, and their dominators."""

    def __init__(self, graph: fx.Graph, facts: Mapping[fx.Node, NodeFacts]) -> None:
        self.facts = facts
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.inputs: dict[fx.Node, list[fx.Node]] = {}
        # The live nodes that each node is computed from, itself among them, as bits by their order.
        self._sources: dict[fx.Node, int] = {}
        # Immediate dominators; None is the common root of all block inputs.
        self.dominator: dict[fx.Node, fx.Node | None] = {}
        for node in graph.nodes:
            if node.op == "output":
                continue
            if not facts[node].live:
                continue
            self.inputs[node] = [i for i in node.all_input_nodes if i in self.dominator]
            self._sources[node] = 1 << self.order[node]
            for source in self.inputs[node]:
                self._sources[node] |= self._sources[source]
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

    def reaches(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether ``b`` is computed from ``a``, or is ``a``."""
        return bool(self._sources[b] >> self.order[a] & 1)

    def between(self, split_point: fx.Node | None, end: fx.Node) -> list[fx.Node]:
        """The nodes on the paths from the split_point (left out) to ``end`` (included)."""
        seen: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node is not split_point and node not in seen:
                seen.add(node)
                stack += self.inputs[node]
        return sorted(seen, key=self.order.__getitem__)

    def ops(self, nodes: Sequence[fx.Node]) -> Iterator[Op]:
        for node in nodes:
            yield from self.facts[node].ops

    def depth(self, split_point: fx.Node | None, end: fx.Node) -> int:
        """Most convolutions and Linears that a path from the split_point to ``end`` passes."""
        deepest: dict[fx.Node, int] = {}
        for node in self.between(split_point, end):
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

    def keeps_input(self, split_point: fx.Node | None, end: fx.Node) -> bool:
        """Whether a term of ``end`` is the split_point itself, through no convolution or Linear.

        Where paths are added or concatenated, all must pass one; where they are multiplied, a
        gate that is computed from the split_point leaves nothing of it in the product.
        """
        kept: dict[fx.Node, bool] = {}
        for node in self.between(split_point, end):
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
        seen: set[fx.Node] = set()
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if user in seen or user not in self.inputs or self.addition(user) is not None:
                continue
            seen.add(user)
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
