"""Credits callers with the additions of modules that do nothing but add two maps."""

from collections.abc import Mapping, Sequence

from torch import nn

from se_inject.graph.containers import tensors_in
from se_inject.graph.recording.call import Call


def credit_callers(
    recorded: Mapping[str, Sequence[Call]], modules: Mapping[str, nn.Module]
) -> None:
    """Give the addition of a module that does nothing else (``self.add(branch, x)``) to its caller.

    The caller shows which operand is the branch. An ``nn.Sequential`` gets no child, so a module
    that it calls keeps its own addition.
    """
    for name in sorted(recorded, key=len, reverse=True):  # a module comes after its children
        calls = recorded[name]
        callers = [call.caller for call in calls]
        if not all(map(_only_adds, calls)) or any(
            caller is None or isinstance(modules[caller.name], nn.Sequential) for caller in callers
        ):
            continue
        for call, caller in zip(calls, callers, strict=True):
            assert caller is not None
            caller.additions += call.additions
            caller.sums += call.sums
            caller.adders.update(
                path
                for path, child in modules[caller.name].named_modules(remove_duplicate=False)
                if child is modules[name]
            )
            call.additions, call.sums = [], []


def _only_adds(call: Call) -> bool:
    """Whether a call returned the sum of two of its arguments, and added nothing else."""
    if len(call.sums) != 1:
        return False
    added, out = call.sums[0].what, call.sums[0].out
    given = [id(t) for t in tensors_in((call.args, call.kwargs))]
    operands = (added.a, added.b)
    plain = added.a is not added.b and not added.blended
    return out is call.returned and plain and all(id(t) in given for t in operands)
