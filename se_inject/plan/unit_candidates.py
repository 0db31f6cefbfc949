"""Model -> the units that could take an SE block, beside or in place of residual branches."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from se_inject.edit.block_class import edit_of
from se_inject.edit.insert import restore
from se_inject.errors import first_line
from se_inject.graph.history_blocks import HistoryBlocks
from se_inject.graph.recording.history import History, record_history
from se_inject.graph.thread import raise_interruption
from se_inject.graph.trace import TracedBlock, on_a_copy
from se_inject.layers.layout import IMAGES
from se_inject.plan.candidates import GIVES_OTHER, Candidate, Candidates
from se_inject.plan.injection import Injection
from se_inject.reasons import Reason, Skipped
from se_inject.sites.scaled import UnitSite
from se_inject.sites.unit_point import Unit
from se_inject.sites.units import find_units, unit_site

# With where="auto", a network takes its units if all its skipped additions have these reasons.
_NO_RESIDUAL = {Reason.REPARAMETERISABLE, Reason.INJECTED}
# Additions with these reasons are not residual, so units may be looked for beside them.
_NOT_RESIDUAL = {*_NO_RESIDUAL, Reason.FUSION, Reason.NO_CONVOLUTION, Reason.TOKENS}
_NOT_RESIDUAL |= {Reason.NO_MAP, Reason.HIDDEN, Reason.NOT_REACHED}


def with_units(model: nn.Module, residual: Candidates, injection: Injection) -> Candidates:
    """The residual candidates, and the units if ``injection.where`` asks for them."""
    if not _are_wanted(residual, injection):
        return residual

    def work(twin: nn.Module, device: torch.device) -> Candidates:
        return _beside(twin, device, residual, injection)

    return on_a_copy(model, work)


def _beside(
    twin: nn.Module, device: torch.device, residual: Candidates, injection: Injection
) -> Candidates:
    injected = [name for name, module in twin.named_modules() if edit_of(module)]
    if injected:
        restore(twin)  # a unit that has its SE block already would look like a gated one
    modules = dict(twin.named_modules())
    try:
        history = record_history(twin, residual.trace.example, device)
    except Exception as error:  # a foreign forward may raise anything
        raise_interruption(error)
        why = f"{type(error).__name__}: {first_line(error)}"
        return residual.plus([], [Skipped("", Reason.NOT_REACHED, why)], {})
    adding = {name for name in injected if any(c.additions for c in history.calls_of(name))}
    if adding and injection.where == "auto":
        return residual
    blocks = adding | {candidate.block for candidate in residual.found}
    blocks |= {s.block for s in residual.skipped if s.reason not in _NOT_RESIDUAL}
    traces = HistoryBlocks(history, modules, device)
    return _find(history, modules, traces, residual, blocks, injected, injection)


def _are_wanted(residual: Candidates, injection: Injection) -> bool:
    if injection.where == "residual" or residual.trace.stopped or injection.placement != "standard":
        return False
    if injection.where == "units":
        return True
    reasons = {entry.reason for entry in residual.skipped}
    return not residual.found and reasons <= _NO_RESIDUAL


def _find(
    history: History,
    modules: Mapping[str, nn.Module],
    traces: HistoryBlocks,
    residual: Candidates,
    blocks: set[str],
    injected: Sequence[str],
    injection: Injection,
) -> Candidates:
    found = find_units(history, modules, blocks)
    candidates: list[Candidate] = []
    skipped = [Skipped(name, reason) for name, reason, _ in found.skipped]
    own: dict[str, TracedBlock] = {}
    for unit in found.units:
        made = _candidate(history, traces, unit)
        if isinstance(made, Skipped):
            skipped.append(made)
        elif made.block in injected or made in candidates:
            continue  # a block that is called twice gets one SE block
        elif injection.se_layer is not None and made.in_eval.layout != IMAGES:
            skipped.append(Skipped(made.block, Reason.LAYOUT))
        else:
            candidates.append(made)
            block = traces.of(made.block)
            assert isinstance(block, TracedBlock)
            own[made.block] = block
    return residual.plus(candidates, skipped, own)


def _candidate(history: History, traces: HistoryBlocks, unit: Unit) -> Candidate | Skipped:
    """The site of a unit in the first of its calls that has one, or why none of them has one."""
    skipped: Skipped | None = None
    for number in unit.calls:
        call = history.calls[number]
        block = traces.of(call.name)
        if isinstance(block, str):
            skipped = skipped or Skipped(call.name, Reason.UNTRACED, block)
            continue
        in_eval = in_train = unit_site(block.eval, history, call, unit)
        if block.train is not block.eval:
            in_train = unit_site(block.train, history, call, unit)
        if isinstance(in_eval, UnitSite) and isinstance(in_train, UnitSite):
            if not (block.eval.returns_same and block.train.returns_same):
                skipped = skipped or Skipped(call.name, Reason.UNTRACED, GIVES_OTHER)
                continue
            return Candidate(call.name, in_eval, in_train)
        reason = in_train if isinstance(in_eval, UnitSite) else in_eval
        skipped = skipped or Skipped(call.name, str(reason))
    assert skipped is not None
    return skipped
