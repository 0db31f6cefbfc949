"""Which sites get what: reduction ratio, include and exclude; what is skipped and why.

A plan is made on a copy of the model on meta tensors; nothing here changes the model.
"""

import difflib
import fnmatch
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from se_inject.edit.block_class import edit_of
from se_inject.errors import ArgumentError, NoSiteError, SEInjectError, first_line
from se_inject.graph.meta import meta_copy, on_meta
from se_inject.graph.record import Arguments, block_label
from se_inject.graph.trace import Trace, TracedBlock, UntracedBlock, trace_blocks
from se_inject.layers.attention import Attention
from se_inject.layers.squeeze_excite import (
    IMAGES,
    Layout,
    SECost,
    SqueezeExcite,
    bottleneck_width,
    se_cost,
)
from se_inject.layers.variant import Gate, Init, Placement, Squeeze, Variant
from se_inject.plan.checks import check_arguments, check_model
from se_inject.sites.residual import Reason, ResidualSite, find_sites

if TYPE_CHECKING:
    from rich.console import RenderableType

Ratio = int | Mapping[str, int]
Patterns = str | Sequence[str] | None
SELayer = Callable[[int], nn.Module]
_Found = tuple[str, ResidualSite, ResidualSite]


@dataclass(frozen=True)
class Site:
    """One SE block to be inserted. MACs are for one image."""

    block: str  # "layer1.0"; "" is the model itself
    child: str  # the attribute that the SE block becomes: "se"
    channels: int
    r: int
    bottleneck: int | None  # None: a user's se_layer, which has none that we know of
    shape: tuple[int, ...]  # (C, H, W) or (C, T, H, W) of the scaled map in the first call
    layout: Layout
    cost: SECost
    device: torch.device
    dtype: torch.dtype
    where: tuple[ResidualSite, ResidualSite] = field(repr=False)  # in eval and in train graph

    @property
    def params(self) -> int:
        """Added parameters."""
        return self.cost.params

    @property
    def macs(self) -> int:
        """Added multiply-accumulates for one image: layers, squeeze and scale."""
        return self.cost.macs

    @property
    def name(self) -> str:
        """Dotted name of the SE block in the model: ``layer1.0.se``."""
        return f"{self.block}.{self.child}".lstrip(".")

    def to_dict(self) -> dict[str, Any]:
        return {
            "block": self.block,
            "channels": self.channels,
            "bottleneck": self.bottleneck,
            "shape": list(self.shape),
            "params": self.params,
            "macs": self.macs,
        }


@dataclass(frozen=True)
class Skipped:
    """An addition of two maps that gets no SE block (once, however often its block is called).

    With ``Reason.NOT_REACHED`` it is no addition, but what comes after the point where the
    recorded forward stopped, or a way that it took for no value (``if x.mean() > 0``).
    """

    block: str
    reason: str
    detail: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"block": self.block, "reason": self.reason}


@dataclass(frozen=True)
class Plan:
    """What :func:`inject_se` would do to one model. ``print`` it with rich, or ``apply`` it."""

    model: nn.Module = field(repr=False, compare=False)
    r: Ratio
    variant: Variant
    se_layer: SELayer | None  # in place of the SE block: of the variant only the placement counts
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    example: Arguments = field(repr=False, compare=False)  # what the recorded forward was given
    blocks: Mapping[str, TracedBlock] = field(repr=False, compare=False)
    modules: Mapping[str, nn.Module] = field(repr=False, compare=False)  # that have a site

    @property
    def input_size(self) -> list[int]:
        """Of one image: [C, H, W] (of the first tensor that the forward takes)."""
        tensors = [t for t in pytree.tree_leaves(self.example) if isinstance(t, torch.Tensor)]
        return list(tensors[0].shape[1 if tensors[0].dim() >= 4 else 0 :]) if tensors else []

    @property
    def added(self) -> SECost:
        """Parameters and MACs of all sites together."""
        return sum_costs(site.cost for site in self.sites)

    def make_layer(self, site: Site) -> nn.Module:
        """A new SE block (or ``se_layer``) for a site, on its device and in its dtype."""
        if self.se_layer is not None:
            return self.se_layer(site.channels).to(device=site.device, dtype=site.dtype)
        assert site.bottleneck is not None
        return SqueezeExcite(
            site.channels,
            site.bottleneck,
            layout=site.layout,
            squeeze=self.variant.squeeze,
            gate=self.variant.gate,
            bias=self.variant.bias,
            init=self.variant.init,
            device=site.device,
            dtype=site.dtype,
        )

    def apply(self) -> nn.Module:
        """Insert the SE blocks into the model, in place, and return it."""
        from se_inject.edit.insert import apply_plan  # downstream of the plan

        return apply_plan(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data."""
        return {
            "r": dict(self.r) if isinstance(self.r, Mapping) else self.r,
            "variant": asdict(self.variant)
            if self.se_layer is None
            else {"placement": self.variant.placement, "attention": layer_name(self.se_layer)},
            "added": {"params": self.added.params, "macs": self.added.macs},
            "sites": [site.to_dict() for site in self.sites],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
        }

    def __rich__(self) -> "RenderableType":
        from se_inject.report.summary import plan_table  # downstream of the plan

        return plan_table(self)


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

    Raises:
        ArgumentError: an argument cannot work, or a glob matches no block.
        UnsupportedModelError: the model is compiled, scripted or wrapped for distributed runs.
        ForwardError: the forward fails on the example input.
        NoSiteError: there is no residual addition that can take an SE block.
    """
    variant = Variant(placement, squeeze, gate, bias, init, divisor)
    check_arguments(r, variant, se_layer)
    r = {k: int(v) for k, v in r.items()} if isinstance(r, Mapping) else int(r)
    check_model(model)
    modules = dict(model.named_modules())
    images_only = se_layer is not None
    trace, found, skipped = _find(modules, model, example_input, placement, images_only)
    if any(entry.reason == Reason.CHANNELS_UNKNOWN for entry in skipped):
        trace, found, skipped = _find(
            modules, model, example_input, placement, images_only, follow=True
        )
    if trace.stopped:
        warnings.warn(
            f"{trace.stopped}: blocks that would run after that are not planned.",
            stacklevel=2,
        )
    if trace.guessed:
        warnings.warn(
            f"{block_label(trace.guessed[0])} asks tensors for their values, and meta tensors have"
            " none: planned as if they were false or 0; what else it may call is not planned.",
            stacklevel=2,
        )

    names = [*dict.fromkeys([name for name, *_ in found] + [s.block for s in skipped])]
    wanted = matching(names, include, "include") if include is not None else set(names)
    wanted -= matching(names, exclude, "exclude") if exclude is not None else set()
    skipped += [Skipped(name, Reason.EXCLUDED) for name, *_ in found if name not in wanted]
    found = [entry for entry in found if entry[0] in wanted]
    if not found:
        raise NoSiteError(_no_site_message(model, skipped), skipped)

    ratios = _ratios([name for name, *_ in found], names, r)
    taken: Counter[str] = Counter()
    sites = []
    for name, in_eval, in_train in found:
        taken[name] += 1
        sites.append(
            _make_site(
                model,
                modules[name],
                name,
                taken[name],
                ratios[name],
                variant,
                se_layer,
                in_eval,
                in_train,
            )
        )
    _warn_of_floor(sites, divisor)
    return Plan(
        model=model,
        r=r,
        variant=variant,
        se_layer=se_layer,
        sites=tuple(sites),
        skipped=tuple(skipped),
        example=trace.example,
        blocks={block.name: block for block in trace.blocks if isinstance(block, TracedBlock)},
        modules={site.block: modules[site.block] for site in sites},
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
            skipped += _untraced(block)
            continue
        pairs, others = _sites_of(block, modules[block.name], placement, images_only)
        found += [(block.name, *pair) for pair in pairs]
        skipped += others
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


def _untraced(block: UntracedBlock) -> list[Skipped]:
    return [
        Skipped(block.name, Reason.TOKENS if len(shape) == 3 else Reason.UNTRACED, block.why)
        for shape in block.additions
    ]


def _make_site(
    model: nn.Module,
    module: nn.Module,
    name: str,
    number: int,
    r: int,
    variant: Variant,
    se_layer: SELayer | None,
    in_eval: ResidualSite,
    in_train: ResidualSite,
) -> Site:
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


def layer_name(se_layer: SELayer) -> str:
    """Of timm's attention, or of a user's function or class."""
    name = getattr(se_layer, "name", None) or getattr(se_layer, "__name__", None)
    return name if isinstance(name, str) else type(se_layer).__name__


def _fault(what: str, error: Exception) -> str:
    said = f": {text}" if (text := first_line(error)) else ""
    return (
        f"{what} fails ({type(error).__name__}{said}). Exclude such blocks, or use another layer."
    )


def sum_costs(costs: Iterable[SECost]) -> SECost:
    """Column sums."""
    columns = zip(*((c.params, c.layers, c.squeeze, c.scale) for c in costs), strict=True)
    return SECost(*(sum(column) for column in columns))


# --- globs -------------------------------------------------------------------------------------


def matching(
    names: Sequence[str],
    patterns: str | Sequence[str],
    argument: str,
    what: str = "block with an addition",
) -> set[str]:
    """The names that any of the globs matches; each glob must match one.

    Raises:
        ArgumentError: a glob matches none; the message shows near names.
    """
    matched: set[str] = set()
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ArgumentError(
                f"{argument} takes a glob or a list of globs on names, not {pattern!r}."
            )
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if not hits:
            raise ArgumentError(
                f"{argument}={pattern!r} matches no {what}."
                f" Names are like {near_names(pattern, names)}."
            )
        matched |= hits
    return matched


def near_names(name: str, names: Sequence[str]) -> str:
    """A few of the names, the most alike first, for an error message."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.3) or names[:4]
    return ", ".join(map(repr, dict.fromkeys(near)))


def _ratios(wanted: Sequence[str], names: Sequence[str], r: Ratio) -> dict[str, int]:
    if not isinstance(r, Mapping):
        return dict.fromkeys(wanted, r)
    matches = {pattern: matching(names, pattern, "r") for pattern in r}
    ratios = {}
    for name in wanted:
        pattern = next((p for p in r if name in matches[p]), None)
        if pattern is None:
            raise ArgumentError(f"r={dict(r)} says nothing of block {name!r}; add '*': 16.")
        ratios[name] = r[pattern]
    return ratios


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
            stacklevel=3,
        )
