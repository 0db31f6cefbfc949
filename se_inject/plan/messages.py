"""What the user is told about a plan: why there is no site, and what deserves a warning."""

from collections import Counter
from collections.abc import Sequence

from torch import nn

from se_inject.edit.site import Site
from se_inject.errors import warn
from se_inject.graph.trace import Trace
from se_inject.names import block_label, plural
from se_inject.plan.candidates import Candidate
from se_inject.plan.injection import Injection
from se_inject.reasons import UNIT_REASONS, Reason, Skipped


def no_site_message(model: nn.Module, skipped: Sequence[Skipped], injection: Injection) -> str:
    """Why a model has no site: each reason with an example and the number of its additions."""
    kind = type(model).__name__
    injected = [s.block for s in skipped if s.reason == Reason.INJECTED]
    if injected:
        return (
            f"{kind} has SE blocks already ({len(injected)}, first in {block_label(injected[0])})"
            " and no other site. Call remove_se(model) first to inject again."
        )
    if not skipped:
        text = f"no residual site: the forward of {kind} adds no two maps of the same shape"
        if injection.where == "residual":
            return f"{text}. where='auto' takes its other units (--where auto)."
        if injection.placement != "standard":
            return f"{text}, which placement={injection.placement!r} needs; leave that out."
        return f"{text}, and it has no other unit of convolutions."
    examples = {
        s.reason: (s.block or "the model itself") + (f": {s.detail}" if s.detail else "")
        for s in reversed(skipped)
    }
    return f"no residual site in {kind}: " + "; ".join(
        f"{count} x {reason} (such as {examples[reason]})"
        for reason, count in Counter(s.reason for s in skipped).most_common()
    )


def kind_of_blocks(found: Sequence[Candidate], skipped: Sequence[Skipped]) -> str:
    """What the blocks of a plan are called in an error about a glob that matches none of them."""
    units = any(candidate.in_eval.kind == "unit" for candidate in found)
    units = units or any(entry.reason in UNIT_REASONS for entry in skipped)
    additions = any(candidate.in_eval.kind == "residual" for candidate in found)
    additions = additions or any(entry.reason not in UNIT_REASONS for entry in skipped)
    if units:
        return "block with an addition or unit" if additions else "unit"
    return "block with an addition"


def warn_of_gaps(trace: Trace) -> None:
    """Warn about the parts of the forward that the recording did not see."""
    if trace.stopped and trace.missed:
        warn(f"{trace.stopped}: blocks that would run after that are not planned.")
    if trace.guessed:
        warn(
            f"{block_label(trace.guessed[0])} asks tensors for their values, and meta tensors have"
            " none. They count as false or 0, and what else the code may call is not planned."
        )


def gaps_message(blocks: int, skipped: Sequence[Skipped]) -> str | None:
    """How many blocks that look residual get no SE block, and why. None means that there are none.

    Args:
        blocks: how many blocks get one.
    """
    gaps = {
        s.block: s.reason for s in reversed(skipped) if Reason(s.reason).is_gap and s.looks_residual
    }
    if not gaps:
        return None
    reasons = ", ".join(dict.fromkeys(reversed(gaps.values())))
    return (
        f"{len(gaps)} of {plural(blocks + len(gaps), 'residual block')} have no SE block:"
        f" {reasons}. See plan_se(model).skipped."
    )


def warn_of_floor(sites: Sequence[Site], divisor: int) -> None:
    """Warn that ``r`` has no effect, if it is larger than the channels of every block."""
    if all(site.bottleneck and site.r > site.channels for site in sites):
        site = max(sites, key=lambda site: site.channels)
        warn(
            f"r={site.r} is more than the channels of any block (at most {site.channels}):"
            f" every bottleneck is kept at width {site.bottleneck}, never under divisor={divisor}."
        )
