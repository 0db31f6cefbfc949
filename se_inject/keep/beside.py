"""Describes what was injected as JSON, for the ``config.json`` of transformers or timm.

Their folders hold all tensors of a model and a description that builds its class. ``described``
says what ``inject_se`` did, and ``repeat`` does it again on a base before its tensors are loaded.
"""

from importlib import metadata
from typing import Any

from torch import nn

from se_inject.errors import CheckpointError, NoSiteError
from se_inject.keep.header import SavedSite, by_call, format_of, saved_sites
from se_inject.keep.read import parse_plan, printable
from se_inject.keep.replan import like, plan_again
from se_inject.layers.attention import SELayer
from se_inject.names import block_label

# If a bottleneck is wider than its map and than this, a hostile file is asking for memory. There
# are no tensors here that bound the widths.
_WIDE = 4096


def described(model: nn.Module) -> dict[str, Any]:
    """What was injected into a model, as JSON-ready data.

    Raises:
        NoSiteError: the model has no SE block.
    """
    examples: list[Any] = []
    sites = saved_sites(model, examples)
    if not sites:
        raise NoSiteError(f"{type(model).__name__} has no SE block; inject_se(model) makes them.")
    return {
        "format": format_of(sites),
        "version": metadata.version("se-inject"),
        "sites": [site.to_dict() for site in sites],
        "examples": examples,
    }


def repeat(base: nn.Module, plan: Any, source: str, se_layer: SELayer | None = None) -> nn.Module:
    """Inject into a base what ``plan`` says, in place. The new tensors have their initial values.

    Args:
        plan: what :func:`described` returned. It may come from anybody.
        source: where the plan comes from, for messages.
        se_layer: the ``se_layer`` of the saved model, if it had one.

    Raises:
        CheckpointError: the plan is damaged, or was made for another base.
    """
    sites, examples = parse_plan(plan, source)
    for settings, own in by_call(sites).items():
        for site in own:
            _check_width(site, source)
        example = examples[settings.example]
        if example is None:
            raise CheckpointError(
                f"{source} cannot say what the forward takes: inject by hand, and then load."
            )
        plan_again(base, settings, own, like(base, example), se_layer, source).apply()
    return base


def _check_width(site: SavedSite, source: str) -> None:
    if (site.bottleneck or 0) > max(_WIDE, site.channels or 0):
        raise CheckpointError(
            f"{source}: the SE block of {printable(block_label(site.block))} cannot have a"
            f" bottleneck of {site.bottleneck} channels."
        )
