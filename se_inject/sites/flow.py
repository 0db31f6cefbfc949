"""The data flow of a block graph: what is computed from the inputs, dominators, depth."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import fx

from se_inject.graph.facts import NodeFacts
from se_inject.graph.operations.ops import MATRIX_PRODUCT, Op
from se_inject.graph.operations.value import Value

# A step of the flow is a node of the block graph, or a value that no node stands for. Such values
# are those that a child with several outputs computed on the way, and those that an argument went
# through before the block was called.
Step = fx.Node | Value
Past = Sequence[Value | None]


class Flow:
    """The data flow of a block graph: its steps from the inputs on, and their dominators.

    Args:
        graph: the block's own forward.
        facts: what each node computed.
        past: where each tensor that the block was given comes from. By default the flow begins
            with the block.
        adders: the children that only add their inputs. Their calls are additions.
        root: if it is given, only what is computed from this step is followed. Everything else that
            the block was given (a time, a mask, a style) then counts like a parameter.
    """

    def __init__(
        self,
        graph: fx.Graph,
        facts: Mapping[fx.Node, NodeFacts],
        past: Past | None = None,
        root: Step | None = None,
        adders: frozenset[str] = frozenset(),
    ) -> None:
        self.graph = graph
        self.adders = adders
        self.facts = facts
        self.past = past
        self.root = root
        self.order: dict[Step, int] = {}  # a step comes after the inputs that it is computed from
        self.inputs: dict[Step, list[Step]] = {}
        self.passed: dict[Step, tuple[Op, ...]] = {}  # what ran between a step and its inputs
        # Immediate dominators; None is the common root of all inputs.
        self.dominator: dict[Step, Step | None] = {}
        self.roots: dict[Step, frozenset[Step]] = {}  # the inputs that a step is computed from
        # Whether a row of additions is that of RepVGG's, by its last addition.
        self.repvgg_rows: dict[fx.Node, bool] = {}
        self._enlarged: set[Step] = set()
        # The steps that each step is computed from, itself among them, as bits by their order.
        self._sources: dict[Step, int] = {}
        self._rooted: dict[Step, Flow] = {}
        self._owner: dict[Value, fx.Node] = {}
        # An attribute is left out, because its value may come from another call.
        nodes = [n for n in graph.nodes if n.op not in ("output", "get_attr")]
        for node in nodes:
            if (value := facts[node].value) is not None:
                self._owner.setdefault(value, node)
        for node in nodes:
            if facts[node].value is not None:
                self._visit(node)
        self._position = {node: i for i, node in enumerate(graph.nodes)}

    def _visit(self, end: Step) -> None:
        """Add a step after everything that it is computed from."""
        stack = [end]
        before: dict[Step, tuple[list[Step], tuple[Op, ...], bool]] = {}
        while stack:
            step = stack[-1]
            if step in self.passed:
                stack.pop()
                continue
            if step not in before:
                before[step] = self._before(step)
            inputs, ops, enlarged = before[step]
            if missing := [i for i in inputs if i not in self.passed]:
                stack += missing
                continue
            stack.pop()
            self.passed[step] = ops
            self._add(step, inputs, enlarged)

    def _add(self, step: Step, inputs: list[Step], enlarged: bool) -> None:
        if self.root is not None and step is not self.root:
            inputs = [i for i in inputs if i in self.inputs]
            if not inputs:
                return  # not computed from the root
        self.order[step] = len(self.order)
        self.inputs[step] = [] if step is self.root else inputs
        self._sources[step] = 1 << self.order[step]
        for source in self.inputs[step]:
            self._sources[step] |= self._sources[source]
        common: Step | None = None
        if self.inputs[step]:
            common = inputs[0]
            for other in inputs[1:]:
                common = self.meet(common, other)
        self.dominator[step] = common
        own = frozenset[Step]().union(*(self.roots[i] for i in self.inputs[step]))
        self.roots[step] = own or frozenset([step])
        if enlarged:
            self._enlarged.add(step)

    def _before(self, step: Step) -> tuple[list[Step], tuple[Op, ...], bool]:
        """The inputs of a step, the operations since then, and whether all paths enlarge maps.

        Everything that a child does on the way to its one output is one step. If a child returns
        several outputs, its values are steps of their own.
        """
        value = step if isinstance(step, Value) else self.facts[step].value
        assert value is not None
        owner = self._owner.get(value)
        if isinstance(step, fx.Node) and owner is not step:  # the step is an identity
            return [self._named(value, step)], (), False
        if value.number is not None and self.past is not None and isinstance(step, fx.Node):
            before = self.past[value.number]
            return ([] if before is None else [before]), (), False
        if isinstance(step, Value):
            inputs = [self._owner.get(v, v) for v in value.inputs]
            if value.op is None:
                return list(dict.fromkeys(inputs)), (), False
            return list(dict.fromkeys(inputs)), (value.op,), value.op.enlarges
        seen: dict[Value, bool] = {}
        found: dict[Step, None] = {}
        ran: dict[int, Op] = {}

        stack = [value]
        while stack:  # depth first: a value leaves the stack when its inputs are known
            current = stack[-1]
            inner = []
            for v in current.inputs:
                if v not in self._owner and v.maker is value.maker:
                    inner.append(v)
                else:
                    found.setdefault(self._named(v, step))
            if waiting := [v for v in inner if v not in seen]:
                stack += waiting
                continue
            stack.pop()
            if current.op is not None:
                ran.setdefault(id(current.op), current.op)
            all_of = len(inner) == len(current.inputs) and all(seen[v] for v in inner)
            enlarges = current.op is not None and current.op.enlarges
            seen[current] = enlarges or (bool(inner) and all_of)
        # Attention at a lower resolution that is brought back to the full one is not a decoder.
        attends = any(op.name in MATRIX_PRODUCT for op in ran.values())
        return list(found), tuple(ran.values()), seen[value] and not attends

    def _named(self, value: Value, reader: fx.Node) -> Step:
        """The node that has a value. If identities pass the value on, it is the one being read."""
        alike = (n for n in reader.all_input_nodes if n.op != "get_attr")
        named = next((n for n in alike if self.facts[n].value is value), None)
        return self._owner.get(value, value) if named is None else named

    def position(self, node: fx.Node) -> int:
        """The place of a node in the order in which the graph runs."""
        return self._position[node]

    def rooted(self, root: Step) -> "Flow":
        """The part of the flow that is computed from one of its inputs."""
        if root not in self._rooted:
            self._rooted[root] = Flow(self.graph, self.facts, self.past, root, self.adders)
        return self._rooted[root]

    def meet(self, a: Step | None, b: Step | None) -> Step | None:
        """The nearest step that dominates both. None stands for all block inputs together."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.order[a] > self.order[b]:
                a = self.dominator[a]
            else:
                b = self.dominator[b]
        return a

    def dominates(self, a: Step, b: Step | None) -> bool:
        """Whether every path from the block inputs to ``b`` passes through ``a``."""
        while b is not None and b is not a:
            b = self.dominator[b]
        return b is a

    def reaches(self, a: Step, b: Step) -> bool:
        """Whether ``b`` is computed from ``a``, or is ``a`` itself."""
        return bool(self._sources[b] >> self.order[a] & 1)

    def any_reaches(self, starts: Iterable[Step], ends: Iterable[Step]) -> bool:
        """Whether one of the ends is computed from one of the starts."""
        bits = sum(1 << self.order[start] for start in set(starts))
        return any(self._sources[end] & bits for end in ends)

    def between(self, split_point: Step | None, end: Step) -> list[Step]:
        """The steps on the paths from the split point (not included) to ``end`` (included)."""
        seen: set[Step] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node is not split_point and node not in seen:
                seen.add(node)
                stack += self.inputs[node]
        return sorted(seen, key=self.order.__getitem__)

    def ops(self, steps: Sequence[Step]) -> Iterator[Op]:
        for step in steps:
            yield from self.passed[step]

    def enlarged(self, split_point: Step | None, end: Step) -> bool:
        """Whether every path from the split point to ``end`` has a step that enlarges maps."""
        enlarged: dict[Step, bool] = {}
        for step in self.between(split_point, end):
            inputs = [enlarged.get(i, False) for i in self.inputs[step]]
            enlarged[step] = step in self._enlarged or (bool(inputs) and all(inputs))
        return enlarged.get(end, False)

    def depth(self, split_point: Step | None, end: Step) -> int:
        """The most convolutions and Linears that a path from the split point to ``end`` has."""
        deepest: dict[Step, int] = {}
        for node in self.between(split_point, end):
            before = max((deepest.get(i, 0) for i in self.inputs[node]), default=0)
            deepest[node] = before + sum(op.adds_depth for op in self.passed[node])
        return deepest.get(end, 0)

    def next_step(
        self, node: fx.Node, wanted: Callable[[Sequence[Op]], bool], *, permuted: bool = False
    ) -> fx.Node | None:
        """The next step if it is wanted, past identities (and permutations, with ``permuted``)."""
        while len(node.users) == 1:
            (node,) = node.users
            if len(self.inputs.get(node, ())) != 1 or self.facts[node].shape is None:
                return None
            ops = self.passed[node]
            if ops and wanted(ops):
                return node
            if not all(permuted and op.is_permutation for op in ops):
                return None
        return None

    def keeps_input(self, split_point: Step | None, end: Step) -> bool:
        """Whether a term of ``end`` is the split point itself, without a convolution or Linear.

        Where paths are added or concatenated, each of them must have such a layer. Where they are
        multiplied, one is enough: a gate that is computed from the split point leaves nothing of it
        in the product.
        """
        kept: dict[Step, bool] = {}
        for node in self.between(split_point, end):
            ops = self.passed[node]
            inputs = [kept.get(i, True) for i in self.inputs[node]] or [True]
            joined = any(op.joins for op in ops)
            kept[node] = not any(op.adds_depth for op in ops) and (
                any(inputs) if joined else all(inputs)
            )
        return kept.get(end, True)
