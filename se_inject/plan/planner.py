"""Which sites get what: reduction ratio, include and exclude; what is skipped and why.

A plan is made on a copy of the model on meta tensors; nothing here changes the model.
"""

import itertools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_inject.edit.block_class import edit_of
from se_inject.edit.site import Site
from se_inject.errors import (
    ArgumentError,
    NoSiteError,
    SEInjectError,
    UnsupportedModelError,
    first_line,
)
from se_inject.graph.foreign import foreign_parts
from se_inject.graph.meta import meta_copy, on_meta
from se_inject.graph.trace import Trace, TracedBlock, UntracedBlock, trace_blocks
from se_inject.layers.attention import Attention, SELayer
from se_inject.layers.cost import SECost, se_cost
from se_inject.layers.gates import Gate, Init
from se_inject.layers.layout import IMAGES, KINDS
from se_inject.layers.squeeze_excite import bottleneck_width
from se_inject.layers.squeezes import Squeeze
from se_inject.names import Patterns, block_label
from se_inject.plan.checks import check_injection, check_model
from se_inject.plan.injection import Injection, Ratio
from se_inject.plan.plan import Plan
from se_inject.plan.select import ratios_of, selected
from se_inject.reasons import UNSERVED, Reason, Skipped
from se_inject.sites.find import ResidualSite, find_sites
from se_inject.sites.placements import Placement

_Found = tuple[str, ResidualSite, ResidualSite]


def plan_se(
    model: nn.Module,
    r: Ratio = 16,
    *,
    example_input: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    placement: Placement = "standard",
    squeeze: Squeeze = "avg",
    gate: Gate = "sigmoid",
    bias: bool = True,
    init: Init = "identity",
    divisor: int = 8,
    se_layer: SELayer | None = None,
    strict: bool = False,
) -> Plan:
    """Find the residual sites of ``model`` and say what SE blocks they would get.

    A dry run: the model is neither run nor changed, whatever it is on (meta included).

    Args:
        model: any CNN, built from any library or by hand; 4-D channels-first maps.
        r: reduction ratio C / rd of the SE bottleneck, one for all blocks or a mapping of globs
            on block names, first match wins: ``{"layer4.*": 32, "*": 16}``.
        example_input: what the forward takes: a tensor [N, C, H, W], a tuple of positional or a
            dict of keyword arguments. By default images of the size that the model's
            ``pretrained_cfg`` says, or 224 (then a few other sizes).
        include, exclude: glob or globs on block names ("layer4.*"); exclude wins.
        placement: where at a residual addition the SE block goes (the paper's Tables 14, 15):

            - ``"standard"``: on the branch, before the addition;
            - ``"pre"``: on what the branch reads; the shortcut keeps the map as it was;
            - ``"post"``: behind the addition and, where one follows, its activation;
            - ``"identity"``: on the shortcut;
            - ``"3x3"``: on the branch, behind its last spatial convolution and norm; behind the
              activation too where that convolution is depthwise, as MobileNetV3 has it.

            Which additions are residual is the same for all; where a placement makes no sense,
            ``Plan.skipped`` has the reason.
        squeeze: ``"avg"``, ``"max"``, or ``"none"``: the two layers at every position (Table 16).
        gate: ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"hard_sigmoid"`` (Table 12); formulas in
            :class:`SqueezeExcite`.
        bias: whether the two layers have biases; those of the paper's ablations have none.
        init: ``"identity"`` keeps the function of the model to the last bit at the start, with
            every squeeze and gate; ``"paper"`` is the literal gate over random layers, to train
            from scratch.
        divisor: the bottleneck width is a multiple of this, and at least this (timm: 8).
        se_layer: ``channels -> nn.Module`` in place of SE: a layer from [N, C, H, W] to the same
            shape. Whether the function is preserved is then up to that layer; r, squeeze, gate,
            bias and init are not for it.
        strict: whether it is an error that a block that looks residual gets no SE block.

    Raises:
        ArgumentError: an argument cannot work, or a glob matches no block.
        UnsupportedModelError: the model is compiled, scripted or wrapped for distributed runs; or,
            with ``strict``, a block that looks residual cannot be served.
        ForwardError: the forward fails on the example input.
        NoSiteError: there is no residual addition that can take an SE block.
    """
    injection = Injection(
        r=r,
        divisor=divisor,
        include=include,
        exclude=exclude,
        placement=placement,
        squeeze=squeeze,
        gate=gate,
        bias=bias,
        init=init,
        attention=se_layer,
        strict=strict,
    )
    return make_plan(model, injection, example_input)


def make_plan(model: nn.Module, injection: Injection, example_input: Any = None) -> Plan:
    """:func:`plan_se` with its options in one object."""
    check_injection(injection)
    check_model(model)
    modules = dict(model.named_modules())
    images_only = injection.se_layer is not None
    placement = injection.placement
    trace, found, skipped = _find(modules, model, example_input, placement, images_only)
    if any(entry.reason == Reason.CHANNELS_UNKNOWN for entry in skipped):
        trace, found, skipped = _find(
            modules, model, example_input, placement, images_only, follow=True
        )
    _warn_of_gaps(trace)

    names = [*dict.fromkeys([name for name, *_ in found] + [s.block for s in skipped])]
    wanted = selected(names, injection.include, injection.exclude)
    skipped += [Skipped(name, Reason.EXCLUDED) for name, *_ in found if name not in wanted]
    found = [entry for entry in found if entry[0] in wanted]
    skipped = [
        Skipped(s.block, Reason.EXCLUDED, s.detail)
        if s.reason in UNSERVED and s.block not in wanted
        else s
        for s in skipped
    ]
    if not found:
        raise NoSiteError(_no_site_message(model, skipped), skipped)

    r = injection.r
    r = {k: int(v) for k, v in r.items()} if isinstance(r, Mapping) else int(r)
    ratios = ratios_of([name for name, *_ in found], names, r)
    taken: Counter[str] = Counter()
    sites = []
    for name, in_eval, in_train in found:
        taken[name] += 1
        sites.append(
            _make_site(
                model, modules[name], name, taken[name], ratios[name], injection, in_eval, in_train
            )
        )
    _warn_of_floor(sites, injection.divisor)
    plan = Plan(
        model=model,
        r=r,
        variant=injection.variant,
        se_layer=injection.se_layer,
        sites=tuple(sites),
        skipped=tuple(skipped),
        example=trace.example,
        blocks={block.name: block for block in trace.blocks if isinstance(block, TracedBlock)},
        modules={site.block: modules[site.block] for site in sites},
    )
    if injection.strict and plan.unserved:
        raise UnsupportedModelError(f"{plan.unserved} Leave out strict, or rewrite these blocks.")
    return plan


def _warn_of_gaps(trace: Trace) -> None:
    """Say what of the forward the recording did not see."""
    if trace.stopped:
        warnings.warn(
            f"{trace.stopped}: blocks that would run after that are not planned.", stacklevel=4
        )
    if trace.guessed:
        warnings.warn(
            f"{block_label(trace.guessed[0])} asks tensors for their values, and meta tensors have"
            " none: planned as if they were false or 0; what else it may call is not planned.",
            stacklevel=4,
        )


def _find(
    modules: Mapping[str, nn.Module],
    model: nn.Module,
    example_input: Any,
    placement: Placement,
    images_only: bool,
    *,
    follow: bool = False,
) -> tuple[Trace, list[_Found], list[Skipped]]:
    """Trace the model: its sites (block, in eval, in train), and all other additions."""
    injected = [name for name, module in modules.items() if edit_of(module)]
    skipped = [Skipped(name, Reason.INJECTED) for name in injected]
    found: list[_Found] = []
    trace = trace_blocks(model, example_input, follow=follow)
    for block in trace.blocks:
        if block.name in injected:
            continue
        if isinstance(block, UntracedBlock):
            skipped += _untraced(block, modules[block.name])
            continue
        pairs, others = _sites_of(block, modules[block.name], placement, images_only)
        found += [(block.name, *pair) for pair in pairs]
        skipped += others
    skipped += [Skipped(name, Reason.FOREIGN, why) for name, why in foreign_parts(model)]
    if trace.stopped:
        skipped.append(Skipped("", Reason.NOT_REACHED, trace.stopped))
    skipped += [Skipped(name, Reason.NOT_REACHED, _GUESSED) for name in trace.guessed]
    return trace, found, skipped


_GUESSED = "what it calls where the values of tensors are other than false or 0"


def _sites_of(
    block: TracedBlock, module: nn.Module, placement: Placement, images_only: bool
) -> tuple[list[tuple[ResidualSite, ResidualSite]], list[Skipped]]:
    """The sites of a block, each in its eval and train graph, and its other additions.

    ``images_only``: a user's ``se_layer`` takes [N, C, H, W], so other layouts are skipped.
    """
    sites, rejected = find_sites(block.eval.graph, block.eval.calls, module, placement)
    skipped = [Skipped(block.name, rejection.reason) for rejection in rejected]
    in_train = sites
    if block.train is not block.eval:
        in_train, rejected_in_train = find_sites(
            block.train.graph, block.train.calls, module, placement
        )
        more = Counter(r.reason for r in rejected_in_train) - Counter(r.reason for r in rejected)
        skipped += [Skipped(block.name, reason, "in train mode") for reason in more.elements()]
    if [_position(site) for site in sites] != [_position(site) for site in in_train]:
        return [], skipped + [Skipped(block.name, Reason.MODES_DIFFER)] * len(sites)
    if not (block.eval.returns_same and block.train.returns_same):
        why = "its outputs would change their types"
        return [], skipped + [Skipped(block.name, Reason.UNTRACED, why)] * len(sites)
    pairs = list(zip(sites, in_train, strict=True))
    if images_only:
        skipped += [Skipped(block.name, Reason.LAYOUT) for s in sites if s.layout != IMAGES]
        pairs = [pair for pair in pairs if pair[0].layout == IMAGES]
    return pairs, skipped


def _position(site: ResidualSite) -> tuple[str, int]:
    """What tells sites of one block apart in both of its graphs."""
    return str(site.source.target), site.channels


def _untraced(block: UntracedBlock, module: nn.Module) -> list[Skipped]:
    """Every addition of a block that has no graph, with the reason that fits its shape best."""
    skipped = []
    for shape in block.additions:
        kind = KINDS.get(len(shape))
        # Without a graph nobody knows which dim holds the channels; the layers tell what is meant.
        tokens = (
            kind is not None
            and not kind.channels_last
            and not any(isinstance(m, kind.convolution) for m in module.modules())
        )
        if block.gated:
            skipped.append(Skipped(block.name, Reason.GATED, block.why))
            continue
        reason = Reason.TOKENS if tokens else Reason.UNTRACED
        skipped.append(Skipped(block.name, reason, block.why))
    return skipped


def _make_site(
    model: nn.Module,
    module: nn.Module,
    name: str,
    number: int,
    r: int,
    injection: Injection,
    in_eval: ResidualSite,
    in_train: ResidualSite,
) -> Site:
    variant, se_layer = injection.variant, injection.se_layer
    channels = in_eval.channels
    layout = in_eval.layout
    spaces = [tuple(shape[d] for d in layout.space) for shape in in_eval.shapes]
    if se_layer is None:
        bottleneck = bottleneck_width(channels, r, variant.divisor)
        cost = se_cost(channels, bottleneck, spaces, squeeze=variant.squeeze, bias=variant.bias)
    else:
        bottleneck = None
        cost = _layer_cost(se_layer, channels, in_eval.dtype, spaces)
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters())
    return Site(
        block=name,
        child=_free_name(module, number),
        channels=channels,
        r=r,
        bottleneck=bottleneck,
        shape=(channels, *spaces[0]),
        layout=layout,
        cost=cost,
        device=next((t.device for t in tensors), torch.device("cpu")),
        dtype=in_eval.dtype,
        where=(in_eval, in_train),
    )


def _free_name(module: nn.Module, number: int) -> str:
    """``se``, or ``se2`` for the second site of a block; ``se_inject`` where that is taken.

    timm's blocks have the attribute already: None on the instance is free to use, a module is
    not, and an attribute of the class would hide the child.
    """
    suffix = "" if number == 1 else str(number)
    stems = itertools.chain(("se", "se_inject"), (f"se_inject_{i}_" for i in itertools.count(1)))
    names = (f"{stem}{suffix}" for stem in stems)
    return next(
        name
        for name in names
        if not hasattr(type(module), name) and getattr(module, name, None) is None
    )


def _layer_cost(
    se_layer: SELayer, channels: int, dtype: torch.dtype, spaces: Sequence[Sequence[int]]
) -> SECost:
    """What a user's layer adds: its parameters, and what the flop counter sees of it."""
    from torch.utils.flop_counter import FlopCounterMode

    text = f"se_layer({channels})"
    if isinstance(se_layer, Attention):
        text = se_layer.text(channels)
    try:
        with torch.device("meta"):
            layer = se_layer(channels)
    except SEInjectError:
        raise
    except Exception as error:  # a user's code
        raise ArgumentError(_fault(text, error)) from error
    if not isinstance(layer, nn.Module):
        raise ArgumentError(f"{text} returned {type(layer).__name__}; return an nn.Module.")
    # The layer itself may be in use elsewhere; a norm in it may want more than one image to learn.
    layer = meta_copy(layer).to(dtype).eval()
    flops = 0
    for space in spaces:
        x = torch.empty(1, channels, *space, dtype=dtype, device="meta")
        try:
            with on_meta(), FlopCounterMode(display=False) as counter:
                shape = tuple(layer(x).shape)
        except Exception as error:  # a user's code
            raise ArgumentError(_fault(f"{text} on a map {list(x.shape)}", error)) from error
        if shape != tuple(x.shape):
            raise ArgumentError(
                f"{text} turns a map {list(x.shape)} into {list(shape)}; it must keep the shape."
            )
        flops += counter.get_total_flops()
    params = sum(p.numel() for p in layer.parameters())
    return SECost(params=params, layers=flops // 2, squeeze=0, scale=0)


def _fault(what: str, error: Exception) -> str:
    said = f": {text}" if (text := first_line(error)) else ""
    return (
        f"{what} fails ({type(error).__name__}{said}). Exclude such blocks, or use another layer."
    )


# --- globs -------------------------------------------------------------------------------------


# --- what the user is told -----------------------------------------------------------------------


def _no_site_message(model: nn.Module, skipped: Sequence[Skipped]) -> str:
    kind = type(model).__name__
    injected = [s.block for s in skipped if s.reason == Reason.INJECTED]
    if injected:
        return (
            f"{kind} has SE blocks already ({len(injected)}, first in {block_label(injected[0])})"
            " and no other site. remove_se(model) first to inject anew."
        )
    if not skipped:
        return f"no residual site: the forward of {kind} adds no two maps of one shape."
    examples = {
        s.reason: (s.block or "the model itself") + (f": {s.detail}" if s.detail else "")
        for s in reversed(skipped)
    }
    return f"no residual site in {kind}: " + "; ".join(
        f"{count} x {reason} (such as {examples[reason]})"
        for reason, count in Counter(s.reason for s in skipped).most_common()
    )


def _warn_of_floor(sites: Sequence[Site], divisor: int) -> None:
    if all(site.bottleneck and site.r > site.channels for site in sites):
        site = max(sites, key=lambda site: site.channels)
        warnings.warn(
            f"r={site.r} is more than the channels of any block (at most {site.channels}):"
            f" every bottleneck is kept at width {site.bottleneck}, never under divisor={divisor}.",
            stacklevel=4,
        )
