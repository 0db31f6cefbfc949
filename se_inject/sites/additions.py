"""Which nodes of a block graph add two maps, and what they add."""

from torch import fx

from se_inject.graph.operations.ops import Op
from se_inject.sites.flow import Flow, Step


def addition(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node, Op] | None:
    """The two operands and the operation, if the node itself adds maps computed from the inputs."""
    ops = flow.facts[node].ops if node in flow.facts else ()
    op = next((op for op in ops if op.adds_maps), None)
    others = [o for o in ops if o is not op and not (op and op.stacked and o.name == "stack")]
    if op is None or others or "out" in node.kwargs:
        return None
    if node.op == "call_module":  # the child has to be one that only adds its inputs
        operands = [i for i in node.all_input_nodes if flow.facts[i].value is not None]
        if str(node.target) not in flow.adders or len(operands) != 2:
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
        shape = flow.facts[node].shape
        nodes = [v for v in (*values, *named) if isinstance(v, fx.Node)]
        values = [v for v in nodes if flow.facts[v].value and flow.facts[v].shape == shape]
    a, b = [*values[:2], None, None][:2]
    return (a, b, op) if isinstance(a, fx.Node) and isinstance(b, fx.Node) else None


def operands(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two operands of an addition."""
    added = addition(flow, node)
    assert added is not None
    return added[:2]


def reader_of(flow: Flow, node: fx.Node) -> fx.Node:
    """The node that reads the operands of an addition: itself, or the stack that it sums."""
    a, b = operands(flow, node)
    if a in node.all_input_nodes and b in node.all_input_nodes:
        return node
    return next(n for n in node.all_input_nodes if a in n.all_input_nodes)


def joins_after(flow: Flow, node: fx.Node) -> set[Step]:
    """The concatenations that ``node`` flows into without passing another addition."""
    found: set[Step] = set()
    reached: set[Step] = {node}
    for step in sorted(flow.inputs, key=flow.order.__getitem__):
        if not reached.intersection(flow.inputs[step]) or step in reached:
            continue
        if isinstance(step, fx.Node) and addition(flow, step) is not None:
            continue
        reached.add(step)
        own = isinstance(step, fx.Node) and step.op == "call_function"
        if own and any(op.joins for op in flow.passed[step]):
            found.add(step)
    return found
