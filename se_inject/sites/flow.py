"""The data flow of a block graph: what is computed from the inputs, dominators, depth."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import fx

from se_inject.graph.facts import NodeFacts
from se_inject.graph.log import Value
from se_inject.graph.ops import MATRIX_PRODUCT, Op

# A step of the flow: a node of the block graph, or a value that no node of it stands for (what a
# child with several outputs computed on the way, and what an argument went through before).
Step = fx.Node | Value
Past = Sequence[Value | None]


class Flow:
    """The data flow of a block graph: its steps from the inputs on, and their dominators.

    Args:
        graph: the block's own forward.
        facts: what each node computed.
        past: where each tensor that the block was given comes from; by default the flow begins
            with the block.
        adders: the children that only add what they are given: their calls are additions.
        root: follow only what is computed from this step. Whatever else the block was given (a
            time, a mask, a style) then counts as a parameter does.
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
        self.order: dict[Step, int] = {}  # inputs before what is computed from them
        self.inputs: dict[Step, list[Step]] = {}
        self.passed: dict[Step, tuple[Op, ...]] = {}  # what ran between a step and its inputs
        # Immediate dominators; None is the common root of all inputs.
        self.dominator: dict[Step, Step | None] = {}
        self.roots: dict[Step, frozenset[Step]] = {}  # the inputs that a step is computed from
        self._enlarged: set[Step] = set()
        # The steps that each step is computed from, itself among them, as bits by their order.
        self._sources: dict[Step, int] = {}
        self._rooted: dict[Step, Flow] = {}
        self._owner: dict[Value, fx.Node] = {}
        # What an attribute holds may have been put there in another call.
        nodes = [n for n in graph.nodes if n.op not in ("output", "get_attr")]
        for node in nodes:
            if (value := facts[node].value) is not None:
                self._owner.setdefault(value, node)
        for node in nodes:
            if facts[node].value is not None:
                self._visit(node)
        self._position = {node: i for i, node in enumerate(graph.nodes)}

    def _visit(self, end: Step) -> None:
        """Add a step, after all that it is computed from."""
        stack = [end]
        while stack:
            step = stack[-1]
            if step in self.passed:
                stack.pop()
                continue
            inputs, ops, enlarged = self._before(step)
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
        """The inputs of a step, what ran since, and whether all that came of it was enlarged.

        What a child does on the way to its one output is one step. Values of a child that returns
        several are steps of their own.
        """
        value = step if isinstance(step, Value) else self.facts[step].value
        assert value is not None
        owner = self._owner.get(value)
        if isinstance(step, fx.Node) and owner is not step:  # an identity
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
        while stack:  # depth first: a value is left when its inputs are known
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
        # Attention at a lower resolution, brought back to its own, is no decoder.
        attends = any(op.name in MATRIX_PRODUCT for op in ran.values())
        return list(found), tuple(ran.values()), seen[value] and not attends

    def _named(self, value: Value, reader: fx.Node) -> Step:
        """The node that has a value: where identities pass it on, the one that is read."""
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
        """The nearest node that dominates both; None for the block inputs together."""
        while a is not b:
            if a is None or b is None:
                return None
            if self.order[a] > self.order[b]:
                a = self.dominator[a]
            else:
                b = self.dominator[b]
        return a

    def dominates(self, a: Step, b: Step | None) -> bool:
        """Whether every path from the block inputs to ``b`` passes ``a``."""
        while b is not None and b is not a:
            b = self.dominator[b]
        return b is a

    def reaches(self, a: Step, b: Step) -> bool:
        """Whether ``b`` is computed from ``a``, or is ``a``."""
        return bool(self._sources[b] >> self.order[a] & 1)

    def between(self, split_point: Step | None, end: Step) -> list[Step]:
        """The steps on the paths from the split_point (left out) to ``end`` (included)."""
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
        """Whether every path from the split_point to ``end`` passes what enlarges maps."""
        enlarged: dict[Step, bool] = {}
        for step in self.between(split_point, end):
            inputs = [enlarged.get(i, False) for i in self.inputs[step]]
            enlarged[step] = step in self._enlarged or (bool(inputs) and all(inputs))
        return enlarged.get(end, False)

    def depth(self, split_point: Step | None, end: Step) -> int:
        """Most convolutions and Linears that a path from the split_point to ``end`` passes."""
        deepest: dict[Step, int] = {}
        for node in self.between(split_point, end):
            before = max((deepest.get(i, 0) for i in self.inputs[node]), default=0)
            deepest[node] = before + sum(op.adds_depth for op in self.passed[node])
        return deepest.get(end, 0)

    def read_again(self, step: fx.Node) -> bool:
        """Whether the tensor that an in-place step changes is read later by another name."""
        changed = step.args[0]
        assert isinstance(changed, fx.Node)
        storage = self.facts[changed].storage
        return any(
            self._position[user] > self._position[step]
            for node, facts in self.facts.items()
            if facts.storage == storage and self._position[node] < self._position[step]
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
        first = min(aliases, key=self._position.__getitem__)
        is_callers = not self.facts[first].ops  # nothing in this block has made it
        start = min(self._position[reader] for reader in readers)
        moved: set[fx.Node] = set()
        steps: list[tuple[bool, bool]] = []  # reads the old tensor; writes the old or the new
        for node in self._position:
            if self._position[node] < start or node not in self.facts:
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
            ops = self.passed[node]
            if ops and wanted(ops):
                return node
            if not all(permuted and op.is_permutation for op in ops):
                return None
        return None

    def keeps_input(self, split_point: Step | None, end: Step) -> bool:
        """Whether a term of ``end`` is the split_point itself, through no convolution or Linear.

        Where paths are added or concatenated, all must pass one; where they are multiplied, a
        gate that is computed from the split_point leaves nothing of it in the product.
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

    def joins_after(self, node: fx.Node) -> set[Step]:
        """The concatenations that ``node`` flows into without passing another addition."""
        found: set[Step] = set()
        reached: set[Step] = {node}
        for step in sorted(self.inputs, key=self.order.__getitem__):
            if not reached.intersection(self.inputs[step]) or step in reached:
                continue
            if isinstance(step, fx.Node) and self.addition(step) is not None:
                continue
            reached.add(step)
            own = isinstance(step, fx.Node) and step.op == "call_function"
            if own and any(op.joins for op in self.passed[step]):
                found.add(step)
        return found

    def operands(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        addition = self.addition(node)
        assert addition is not None
        return addition[:2]

    def reader(self, node: fx.Node) -> fx.Node:
        """What reads the operands of an addition: itself, or the stack that it adds up."""
        a, b = self.operands(node)
        if a in node.all_input_nodes and b in node.all_input_nodes:
            return node
        return next(n for n in node.all_input_nodes if a in n.all_input_nodes)

    def addition(self, node: fx.Node) -> tuple[fx.Node, fx.Node, Op] | None:
        """The operands, if the node itself adds two maps computed from the inputs."""
        ops = self.facts[node].ops if node in self.facts else ()
        op = next((op for op in ops if op.adds_maps), None)
        others = [o for o in ops if o is not op and not (op and op.stacked and o.name == "stack")]
        if op is None or others or "out" in node.kwargs:
            return None
        if node.op == "call_module":  # one that only adds what it is given
            operands = [i for i in node.all_input_nodes if self.facts[i].value is not None]
            if str(node.target) not in self.adders or len(operands) != 2:
                return None
            return operands[0], operands[1], op
        if node.op not in ("call_function", "call_method"):
            return None
        named = [node.kwargs[k] for k in ("input", "other") if k in node.kwargs]
        values = [*node.args, *named]
        if op.stacked:
            stack = next((v for v in values if isinstance(v, fx.Node)), None)
            maps = stack.args[0] if stack is not None and stack.args else None
            values = list(maps) if isinstance(maps, list | tuple) else []
        elif op.name in ("addcmul", "addcmul_"):
            named = [node.kwargs[k] for k in ("tensor1", "tensor2") if k in node.kwargs]
            shape = self.facts[node].shape
            nodes = [v for v in (*values, *named) if isinstance(v, fx.Node)]
            values = [v for v in nodes if self.facts[v].value and self.facts[v].shape == shape]
        a, b = [*values[:2], None, None][:2]
        return (a, b, op) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None
