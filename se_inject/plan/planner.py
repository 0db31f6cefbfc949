"""Which sites get what: reduction ratio, include and exclude; what is skipped and why.

A plan is made on a copy of the model on meta tensors; nothing here changes the model.
"""

import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from se_inject.edit.site import Site
from se_inject.errors import NoSiteError, UnsupportedModelError
from se_inject.graph.thread import raise_interruption
from se_inject.layers.attention import SELayer
from se_inject.layers.cost import se_cost
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeeze_excite import bottleneck_width
from se_inject.layers.squeezes import Squeeze
from se_inject.names import Patterns
from se_inject.plan.candidates import Candidate, find_candidates
from se_inject.plan.checks import (
    check_injection,
    check_model,
    refusing_faults_of_the_model,
)
from se_inject.plan.injection import Injection, Ratio
from se_inject.plan.layer_cost import layer_cost
from se_inject.plan.messages import (
    gaps_message,
    kind_of_blocks,
    no_site_message,
    warn_of_floor,
    warn_of_gaps,
)
from se_inject.plan.plan import Plan
from se_inject.plan.select import ratios_of, selected
from se_inject.plan.unit_candidates import with_units
from se_inject.reasons import Reason, Skipped
from se_inject.sites.placements import Placement
from se_inject.sites.scaled import Where


def plan_se(
    model: nn.Module,
    r: Ratio = 16,
    *,
    where: Where = "auto",
    example_input: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    placement: Placement = "standard",
    squeeze: Squeeze = "avg",
    gate: Gate = "sigmoid",
    bias: bool = True,
    shift: bool = False,
    init: Init = "identity",
    divisor: int = 8,
    se_layer: SELayer | None = None,
    strict: bool = False,
) -> Plan:
    """Find the sites of ``model`` and say what SE blocks they would get.

    A dry run: the model is neither run nor changed, whatever it is on (meta included).

    Args:
        model: any CNN, built from any library or by hand; 4-D channels-first maps.
        r: reduction ratio C / rd of the SE bottleneck, one for all blocks or a mapping of globs
            on block names, first match wins: ``{"layer4.*": 32, "*": 16}``.
        where: which maps get an SE block:

            - ``"residual"``: the residual branches, before their additions;
            - ``"units"``: also the units that end without an addition: the concatenation of an
              Inception module, the new maps of a dense layer, the branch of a split block; and
              in a network that has none of these, each convolution's activation (as in SE-VGG);
            - ``"auto"``: the residual branches; units only where the forward adds no two maps but
              those that a block can fold into one convolution (RepVGG).
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
            ``Plan.skipped`` has the reason. Units take ``"standard"`` only.
        squeeze: ``"avg"``, ``"max"``, or ``"none"``: the two layers at every position (Table 16).
        gate: ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"hard_sigmoid"`` (Table 12); formulas in
            :class:`SqueezeExcite`.
        bias: whether the two layers have biases; those of the paper's ablations have none.
        shift: whether the block also adds a number to each channel behind its gate, ``x * s +
            shift``: SE with an additive bias, as chess networks have it.
        init: ``"identity"`` keeps the function of the model to the last bit at the start, with
            every squeeze and gate; ``"paper"`` is the literal gate over random layers, to train
            from scratch.
        divisor: the bottleneck width is a multiple of this, and at least this (timm's
            ``rd_divisor``; 8 there too).
        se_layer: ``channels -> nn.Module`` in place of SE: a layer from [N, C, H, W] to the same
            shape. Whether the function is preserved is then up to that layer (an
            :class:`IdentityStart` around it preserves it); r, squeeze, gate, bias, shift and init
            are not for it.
        strict: a block that looks residual and cannot be served is an error; otherwise
            ``Plan.skipped`` has the reason, and :func:`inject_se` warns.

    Raises:
        ArgumentError: an argument cannot work, or a glob matches no block.
        UnsupportedModelError: the model is compiled, scripted or wrapped for distributed runs; or,
            with ``strict``, a block that looks residual cannot be served.
        ForwardError: the forward fails on the example input.
        NoSiteError: there is no residual addition, and no unit where those are wanted, that can
            take an SE block; or with ``strict`` one that cannot.
    """
    injection = Injection(
        r=r,
        divisor=divisor,
        include=include,
        exclude=exclude,
        where=where,
        placement=placement,
        squeeze=squeeze,
        gate=gate,
        bias=bias,
        shift=shift,
        init=init,
        attention=se_layer,
        strict=strict,
    )
    return make_plan(model, injection, example_input)


def make_plan(model: nn.Module, injection: Injection, example_input: Any = None) -> Plan:
    """:func:`plan_se` with its options in one object."""
    check_injection(injection)
    with refusing_faults_of_the_model():
        check_model(model)
        modules = dict(model.named_modules())
        candidates = find_candidates(model, modules, injection, example_input)
        candidates = with_units(model, candidates, injection)
    warn_of_gaps(candidates.trace)

    blocks = [candidate.block for candidate in candidates.found]
    names = [*dict.fromkeys(blocks + [entry.block for entry in candidates.skipped])]
    if not names:
        raise NoSiteError(no_site_message(model, [], injection))
    what = kind_of_blocks(candidates.found, candidates.skipped)
    wanted = selected(names, injection.include, injection.exclude, what)
    skipped = [
        *candidates.skipped,
        *(Skipped(name, Reason.EXCLUDED) for name in blocks if name not in wanted),
    ]
    found = [candidate for candidate in candidates.found if candidate.block in wanted]
    if not found:
        raise NoSiteError(no_site_message(model, skipped, injection), skipped)

    gaps = gaps_message(
        len({candidate.block for candidate in found}), [s for s in skipped if s.block in wanted]
    )
    if injection.strict and gaps:
        raise NoSiteError(gaps, skipped)

    r = injection.r
    r = {k: int(v) for k, v in r.items()} if isinstance(r, Mapping) else int(r)
    ratios = ratios_of([candidate.block for candidate in found], names, r, what)
    taken: Counter[str] = Counter()
    sites = []
    for candidate in found:
        taken[candidate.block] += 1
        module, number = modules[candidate.block], taken[candidate.block]
        ratio = ratios[candidate.block]
        with refusing_faults_of_the_model():
            sites.append(_make_site(model, module, candidate, number, ratio, injection))
    warn_of_floor(sites, injection.divisor)
    return Plan(
        model=model,
        r=r,
        where=injection.where,
        variant=injection.variant,
        se_layer=injection.se_layer,
        sites=tuple(sites),
        skipped=tuple(skipped),
        gaps=gaps,
        example=candidates.trace.example,
        blocks=candidates.blocks,
        modules={site.block: modules[site.block] for site in sites},
    )


def _make_site(
    model: nn.Module,
    module: nn.Module,
    candidate: Candidate,
    number: int,
    r: int,
    injection: Injection,
) -> Site:
    """The SE block of one site; ``number`` counts the sites of its block, from 1."""
    in_eval = candidate.in_eval
    variant, se_layer = injection.variant, injection.se_layer
    channels = in_eval.channels
    layout = in_eval.layout
    spaces = [tuple(shape[d] for d in layout.space) for shape in in_eval.shapes]
    if se_layer is None:
        bottleneck = bottleneck_width(channels, r, variant.divisor)
        cost = se_cost(
            channels,
            bottleneck,
            spaces,
            squeeze=variant.squeeze,
            bias=variant.bias,
            shift=variant.shift,
        )
    else:
        bottleneck = None
        cost = layer_cost(se_layer, channels, in_eval.dtype, spaces)
    tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters())
    return Site(
        block=candidate.block,
        child=_free_name(module, number),
        channels=channels,
        r=r,
        bottleneck=bottleneck,
        shape=(channels, *spaces[0]),
        layout=layout,
        cost=cost,
        device=next((t.device for t in tensors), torch.device("cpu")),
        dtype=in_eval.dtype,
        where=(candidate.in_eval, candidate.in_train),
    )


def _free_name(module: nn.Module, number: int) -> str:
    """``se``, or ``se2`` for the second site of a block; ``se_inject`` where that is taken.

    timm's blocks have the attribute already: None on the instance is free to use, a module is
    not, and an attribute of the class would hide the child.
    """
    suffix = "" if number == 1 else str(number)
    stems = itertools.chain(("se", "se_inject"), (f"se_inject_{i}_" for i in itertools.count(1)))
    for stem in itertools.islice(stems, 100):
        name = f"{stem}{suffix}"
        if not hasattr(type(module), name) and _is_free(module, name):
            return name
    raise UnsupportedModelError(
        f"{type(module).__name__} has an attribute of every name (its __getattr__ answers to all),"
        " so none is free for the SE block. Exclude such blocks."
    )


def _is_free(module: nn.Module, name: str) -> bool:
    try:
        return getattr(module, name, None) is None
    except Exception as error:  # whatever a foreign __getattr__ may raise: the name is not free
        raise_interruption(error)
        return False
