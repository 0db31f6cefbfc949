"""What changes a map in place, and who notices. The map may be read by another name later."""

from collections.abc import Sequence

from torch import fx

from se_inject.sites.flow import Flow


def is_in_place(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments, judged by the name of its function."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("iadd", "imul", "isub", "itruediv") or (
        node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    )


def read_again(flow: Flow, step: fx.Node) -> bool:
    """Whether the tensor that an in-place step changes is read later by another name."""
    changed = step.args[0]
    assert isinstance(changed, fx.Node)
    storage = flow.facts[changed].storage
    return any(
        flow._position[user] > flow._position[step]
        for node, facts in flow.facts.items()
        if facts.storage == storage and flow._position[node] < flow._position[step]
        for user in node.users
    )


def separable(flow: Flow, source: fx.Node, readers: Sequence[fx.Node]) -> bool:
    """Whether the readers can be given a tensor of their own in place of ``source``.

    If the readers change their tensor in place, nobody else may read the old one afterwards. The
    caller may not either, if the tensor is the caller's. What others change in place would not
    reach the readers, and it would spoil the input that the SE block keeps for the backward pass.
    """
    storage = flow.facts[source].storage
    aliases = [n for n, facts in flow.facts.items() if facts.storage == storage]
    first = min(aliases, key=flow._position.__getitem__)
    is_callers = not flow.facts[first].ops  # no operation of this block made it
    start = min(flow._position[reader] for reader in readers)
    moved: set[fx.Node] = set()
    steps: list[tuple[bool, bool]] = []  # (reads the old tensor, writes the old or the new one)
    for node in flow._position:
        if flow._position[node] < start or node not in flow.facts:
            continue
        reads = [i for i in node.all_input_nodes if i in aliases or i in moved]
        new = [i for i in reads if i in moved or (i is source and node in readers)]
        facts = flow.facts[node]
        if new and is_callers and node.op == "output":
            return False  # the caller would have its own tensor by two names
        if new and facts.storage in (storage, None):  # a view, or a container that holds it
            moved.add(node)
        steps.append((len(new) < len(reads), storage in facts.writes))
    return not any(
        writes and (is_callers or any(old for old, _ in steps[i:]))
        for i, (_, writes) in enumerate(steps)
    )
