"""Makes the plan of a saved model again on a base, which ``load_se`` and ``repeat`` begin with."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import CheckpointError, SEInjectError
from se_inject.keep.header import SavedSite, SharedSettings
from se_inject.layers.attention import SELayer
from se_inject.layers.identity_start import FromIdentity, without_start
from se_inject.names import block_label
from se_inject.plan.injection import Injection
from se_inject.plan.plan import Plan
from se_inject.plan.planner import make_plan
from se_inject.torch_private import pytree


def plan_again(
    base: nn.Module,
    settings: SharedSettings,
    sites: Sequence[SavedSite],
    example: Any,
    se_layer: SELayer | None,
    path: Any,
) -> Plan:
    """The plan of one ``inject_se`` call of a file, or an error if the base has other sites.

    Args:
        settings, sites: what the file says about that call.
        example: the arguments of the recorded forward, in the dtype of the base.
        se_layer: the ``se_layer`` of the saved model, if it had one.
        path: the path of the file, for messages.
    """
    if settings.custom and se_layer is None:
        raise CheckpointError(
            f"{path} was saved from a model with another se_layer. Pass that to load_se too:"
            " load_se(base, path, se_layer=...), or --attention NAME."
        )
    # The file knows whether its layers began as the identity, whatever the caller says.
    se_layer = without_start(se_layer)
    if se_layer is not None and settings.variant.init == "identity":
        se_layer = FromIdentity(se_layer)
    blocks = {site.block: site for site in sites}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They were shown when the saved model was injected.
            plan = make_plan(  # This checks the options of the variant too.
                base,
                Injection(
                    r={_literal(block): site.r for block, site in blocks.items()},
                    include=[_literal(block) for block in blocks],
                    where=settings.where,
                    **vars(settings.variant),
                    attention=se_layer if settings.custom else None,
                ),
                example,
            )
    except SEInjectError as error:
        raise CheckpointError(f"{path} does not fit this base: {error}") from error
    found = {(s.block, s.child): (s.channels, s.bottleneck) for s in plan.sites}
    for site in sites:
        here = found.pop((site.block, site.child), None)
        there = (site.channels, site.bottleneck)
        if here is None or (not settings.custom and here != there):
            raise CheckpointError(
                f"{path} does not fit this base: its SE block in {block_label(site.block)} has"
                f" widths {there}, and here it is {here or 'nowhere'}."
            )
    if found:
        (block, _), *_ = found
        raise CheckpointError(
            f"{path} does not fit this base: it has no SE block for {block_label(block)}."
        )
    return plan


def like(base: nn.Module, example: Any) -> Any:
    """The example in the dtype of the base, which may have been converted after the injection."""
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)

    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return pytree.tree_map(convert, example)


def _literal(name: str) -> str:
    """A glob that matches only ``name``."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
