"""Model -> every site that could take an SE block, and every other addition with its reason."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from se_inject.edit.block_class import edit_of
from se_inject.graph.foreign import foreign_parts
from se_inject.graph.trace import Trace, TracedBlock, UntracedBlock, trace_blocks
from se_inject.layers.layout import IMAGES, KINDS
from se_inject.plan.injection import Injection
from se_inject.reasons import Reason, Skipped
from se_inject.sites.find import find_sites
from se_inject.sites.placements import Placement
from se_inject.sites.scaled import ScaledMap


@dataclass(frozen=True)
class Candidate:
    """A site of a block, in its eval graph and in its train graph."""

    block: str
    in_eval: ScaledMap
    in_train: ScaledMap


@dataclass(frozen=True)
class Candidates:
    """What one recording of a model shows."""

    trace: Trace
    found: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]
    blocks: Mapping[str, TracedBlock]  # the graphs that the candidates are in, by name

    def plus(
        self,
        found: Iterable[Candidate],
        skipped: Iterable[Skipped],
        blocks: Mapping[str, TracedBlock],
    ) -> "Candidates":
        """These candidates and more of them."""
        return Candidates(
            self.trace,
            (*self.found, *found),
            (*self.skipped, *skipped),
            {**self.blocks, **blocks},
        )


def find_candidates(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    injection: Injection,
    example_input: Any,
) -> Candidates:
    """Trace a model and find all its sites, whatever ``include`` and ``exclude`` say.

    Args:
        modules: all modules of the model by name.
        injection: only the placement counts, and whether there is an ``se_layer``, which takes
            maps [N, C, H, W] only.
        example_input: the same as for :func:`se_inject.plan_se`.
    """
    candidates = _find(model, modules, injection, example_input, follow=False)
    if candidates is None or any(
        entry.reason == Reason.CHANNELS_UNKNOWN for entry in candidates.skipped
    ):
        # The blocks that ran before may show what is missing. Following them takes longer.
        candidates = _find(model, modules, injection, example_input, follow=True)
    assert candidates is not None
    return candidates


_GUESSED = "the code that it runs where the value of a tensor is not false or 0"


def _find(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    injection: Injection,
    example_input: Any,
    *,
    follow: bool,
) -> Candidates | None:
    """All candidates, or None if a block can be judged only with ``follow``.

    Such a block needs to know what its inputs went through before it was called.
    """
    injected = [name for name, module in modules.items() if edit_of(module)]
    skipped = [Skipped(name, Reason.INJECTED) for name in injected]
    found: list[Candidate] = []
    trace = trace_blocks(model, example_input, follow=follow)
    images_only = injection.se_layer is not None
    for block in trace.blocks:
        if block.name in injected:
            continue
        if isinstance(block, UntracedBlock):
            if block.gated is None:
                return None
            skipped += _untraced(block, modules[block.name])
            continue
        both = _sites_of(block, modules[block.name], injection.placement, images_only)
        if both is None:
            return None
        sites, others = both
        found += sites
        skipped += others
    if trace.stopped:
        skipped.append(Skipped("", Reason.NOT_REACHED, trace.stopped))
    skipped += [Skipped(name, Reason.NOT_REACHED, _GUESSED) for name in trace.guessed]
    skipped += [Skipped(name, Reason.FOREIGN, why) for name, why in foreign_parts(model)]
    blocks = {block.name: block for block in trace.blocks if isinstance(block, TracedBlock)}
    return Candidates(trace, tuple(found), tuple(skipped), blocks)


def _sites_of(
    block: TracedBlock, module: nn.Module, placement: Placement, images_only: bool
) -> tuple[list[Candidate], list[Skipped]] | None:
    """The sites of a block, and its other additions. None means the same as in :func:`_find`."""
    how = (module, placement, block.adders, block.pasts)
    in_eval = find_sites(block.eval.graph, block.eval.calls, *how)
    if in_eval.asks_past:
        return None
    sites, rejected = in_eval.sites, in_eval.rejected
    skipped = [Skipped(block.name, rejection.reason) for rejection in rejected]
    in_train = sites
    if block.train is not block.eval:
        found_in_train = find_sites(block.train.graph, block.train.calls, *how)
        in_train, rejected_in_train = found_in_train.sites, found_in_train.rejected
        more = Counter(r.reason for r in rejected_in_train) - Counter(r.reason for r in rejected)
        skipped += [Skipped(block.name, reason, "in train mode") for reason in more.elements()]
    if [_position(site) for site in sites] != [_position(site) for site in in_train]:
        return [], skipped + [Skipped(block.name, Reason.MODES_DIFFER)] * len(sites)
    if not (block.eval.returns_same and block.train.returns_same):
        return [], skipped + [Skipped(block.name, Reason.UNTRACED, GIVES_OTHER)] * len(sites)
    candidates = [
        Candidate(block.name, *pair)
        for pair in zip(sites, in_train, strict=True)
        if not images_only or pair[0].layout == IMAGES
    ]
    skipped += [Skipped(block.name, Reason.LAYOUT)] * (len(sites) - len(candidates))
    return candidates, skipped


GIVES_OTHER = (
    "its outputs would change their types, or what it writes into its arguments would be lost"
)


def _position(site: ScaledMap) -> tuple[str, int]:
    """A description of a site by which the two graphs of its block are compared."""
    return str(site.source.target), site.channels


def _untraced(block: UntracedBlock, module: nn.Module) -> list[Skipped]:
    """Every addition of a block that has no graph, with the reason that fits its shape best."""
    skipped = []
    for number, shape in enumerate(block.additions):
        if block.gated is not None and block.gated[number]:
            skipped.append(Skipped(block.name, Reason.GATED, block.why))
            continue
        kind = KINDS.get(len(shape))
        # Without a graph nobody knows which dim holds the channels. The layers give a hint.
        tokens = (
            kind is not None
            and not kind.channels_last
            and not any(isinstance(m, kind.convolution) for m in module.modules())
        )
        reason = Reason.TOKENS if tokens else Reason.UNTRACED
        skipped.append(Skipped(block.name, reason, block.why, block.looks_residual))
    return skipped
