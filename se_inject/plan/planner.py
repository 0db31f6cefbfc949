"""Decides which sites get an SE block, with which reduction ratio, and why others are skipped.

A plan is made on a copy of the model on meta tensors. Nothing here changes the model.
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
    """Find the sites of ``model`` and report which SE blocks they would get.

    This is a dry run. The model is neither run nor changed, and it may be on any device, even meta.

    Args:
        model: any CNN, from a library or written by hand. Its maps may be [N, C, H, W] or
            [N, H, W, C], video [N, C, T, H, W], or sequences [N, C, L].
        r: the reduction ratio C / rd of the SE bottleneck. A number holds for all blocks. A mapping
            gives a number for each glob on block names, and the first glob that matches a block
            counts: ``{"layer4.*": 32, "*": 16}``.
        where: which maps get an SE block:

            - ``"residual"``: the residual branches, before their additions.
            - ``"units"``: also the units that end without an addition. These ends are the
              concatenation of an Inception module, the new maps of a dense layer, and the branch of
              a split block. A network with neither these nor residual branches has its units in
              each convolution with its activation (as in SE-VGG).
            - ``"auto"``: the residual branches. The units get SE blocks only if the forward adds no
              two maps, except in sums that a block can fold into one convolution (RepVGG).
        example_input: the input of the forward. It is a tensor such as [N, C, H, W], a tuple of
            positional arguments or a dict of keyword arguments. The default is an input of the size
            in the model's ``pretrained_cfg``. If that says nothing, 224 x 224 and then a few other
            sizes are tried (for video and sequences, sizes that are usual there).
        include, exclude: one glob or several globs on block names, such as ``"layer4.*"``. Where
            both match a block, ``exclude`` wins.
        placement: where at a residual addition the SE block goes (the paper's Tables 14, 15):

            - ``"standard"``: on the branch, before the addition.
            - ``"pre"``: on the map that the branch reads. The shortcut keeps the map as it was.
            - ``"post"``: after the addition and, if an activation follows, after that too.
            - ``"identity"``: on the shortcut.
            - ``"3x3"``: on the branch, after its last spatial convolution and norm. If that
              convolution is depthwise, the SE block goes after the activation too, as in
              MobileNetV3.

            The placement does not change which additions are residual. If it makes no sense at an
            addition, ``Plan.skipped`` has the reason. Units take ``"standard"`` only.
        squeeze: ``"avg"`` takes the mean of each channel, and ``"max"`` its maximum. With
            ``"none"``, the two layers run at every position (Table 16).
        gate: ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"hard_sigmoid"`` (Table 12). The formulas
            are in :class:`SqueezeExcite`.
        bias: whether the two layers have biases. Those of the paper's ablations have none.
        shift: whether the block also adds a number to each channel after its gate,
            ``x * s + shift``. This is SE with an additive bias, which chess networks have.
        init: ``"identity"`` keeps the outputs of the model equal to the last bit at the start, with
            every squeeze and gate. ``"paper"`` uses the gate as the paper writes it and random
            layers, to train from scratch.
        divisor: the width of the bottleneck is a multiple of this number and never smaller (timm's
            ``rd_divisor``, which is 8 too).
        se_layer: a function ``channels -> nn.Module``. The layers that it makes are inserted in
            place of SE blocks. Each must turn a map [N, C, H, W] into a map of the same shape. The
            layer decides whether the model keeps its outputs; inside an :class:`IdentityStart` it
            keeps them. ``squeeze``, ``gate``, ``bias`` and ``shift`` cannot be combined with a
            layer of your own, and ``r``, ``divisor`` and ``init`` have no effect on it.
        strict: whether it is an error if a block that looks residual cannot get an SE block.
            Otherwise ``Plan.skipped`` has the reason, and :func:`inject_se` warns.

    Raises:
        ArgumentError: an argument has a value that cannot work, or a glob matches no block.
        UnsupportedModelError: the model is compiled, scripted, quantized or wrapped for distributed
            runs, or its own code fails when it is asked for its modules.
        ForwardError: the forward fails on the example input.
        NoSiteError: no residual addition can take an SE block, and no unit can where units are
            wanted. With ``strict``, also if a block that looks residual cannot take one.
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
    """Do the same as :func:`plan_se`, with its options in one object."""
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
    """The SE block of one site. ``number`` counts the sites of its block from 1."""
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
    """A free attribute: ``se``, or ``se2`` for a block's second site, or else ``se_inject``.

    timm's blocks have an attribute ``se`` already. If it is None on the instance, it is free. If it
    is a module, it is not free. An attribute of the class would hide the child.
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
    except Exception as error:  # a foreign __getattr__ may raise anything; the name is not free
        raise_interruption(error)
        return False
