"""Sites -> edited model, and back.

An edit gives a block its SE children and makes the block an instance of a generated subclass of
its class, whose forward calls them. Nothing else of the model changes. How the forward itself
changes is shown in :mod:`se_inject.edit.rewrite` and :mod:`se_inject.edit.around`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_inject.edit.around import source_around
from se_inject.edit.block_class import Edit, Settings, edit_of
from se_inject.edit.rewrite import edit_graph
from se_inject.edit.site import Site, make_layer
from se_inject.edit.whole import ModuleState, all_or_nothing, attributes_of
from se_inject.errors import UnsupportedModelError, first_line
from se_inject.graph.facts import TracedForward
from se_inject.graph.recording.call import Arguments
from se_inject.graph.source import ForwardSource
from se_inject.graph.trace import TracedBlock
from se_inject.layers.attention import SELayer
from se_inject.layers.variant import Variant
from se_inject.names import block_label
from se_inject.sites.scaled import Where

# Python and torch raise one of these when a class refuses an attribute or another __class__. Any
# other error of a user's class is the user's own and is passed on as it is.
_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def insert(
    model: nn.Module,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, TracedBlock],
    *,
    where: Where,
    variant: Variant,
    se_layer: SELayer | None,
    example: Arguments,
) -> nn.Module:
    """Insert SE blocks at all sites, or at none of them if anything fails.

    Args:
        model: it is edited in place and returned.
        sites: where the SE blocks go. Their graph nodes belong to the graphs in ``blocks``.
        modules, blocks: the module and the graphs of each block that has a site, by name.
        where: the ``where`` of the plan. A checkpoint has to repeat it.
        variant, se_layer: what is inserted.
        example: the arguments of the recorded forward, on meta. A checkpoint has to repeat them.

    Raises:
        UnsupportedModelError: a block was replaced after the plan was made, its class cannot be
            subclassed, or the block does not take its SE block.
    """
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    present = dict(model.named_modules())
    for name in by_block:
        if present.get(name) is not modules[name] or edit_of(modules[name]):
            raise UnsupportedModelError(
                f"{block_label(name)} was replaced or injected since the plan was made."
                " Make a new plan."
            )
    # Everything that can fail is made before the model is touched.
    edits: dict[tuple[Any, ...], Edit] = {}
    prepared: list[tuple[str, nn.Module, Edit, dict[str, nn.Module]]] = []
    with torch.inference_mode(False):  # Weights made in inference mode could never learn.
        for name, own in by_block.items():
            module, block = modules[name], blocks[name]
            layers = {site.child: make_layer(site, variant, se_layer) for site in own}
            for layer in layers.values():
                layer.train(module.training)
            settings = Settings(
                r=tuple(site.r for site in own),
                variant=variant,
                custom=se_layer is not None,
                example=example,
                where=where,
            )
            before = tuple(_state_of(module, child) for child in layers)
            # Blocks that share a graph may still differ in which operand is the branch.
            maps = tuple(site.where for site in own)
            graphs = (id(block.eval), id(block.train))
            key = (type(module), graphs, maps, tuple(layers), before, settings.r)
            if key not in edits:
                edits[key] = _edit(type(module), block, own, before, settings)
            prepared.append((name, module, edits[key], layers))

    def edit_all() -> None:
        for name, module, edit, layers in prepared:
            _edit_block(name, module, edit, layers)

    all_or_nothing(edit_all, [ModuleState.of(module) for _, module, _, _ in prepared])
    return model


def withdraw(modules: Mapping[str, nn.Module]) -> None:
    """Take the SE blocks out of these modules again, and out of no other module."""
    _restore_all([(module, edit) for module in modules.values() if (edit := edit_of(module))])


def injected(model: nn.Module) -> Iterator[tuple[str, nn.Module, Edit]]:
    """Yield each block of a model that has SE blocks: its name, its module and its edit.

    A block that has two names comes only once.
    """
    for name, module in model.named_modules():
        if edit := edit_of(module):
            yield name, module, edit


def is_injected(model: nn.Module) -> bool:
    """Whether any block of the model has an SE block that se_inject put there."""
    return any(True for _ in injected(model))


def restore(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Take all SE blocks out of a model; each block gets its class and forward back.

    Args:
        names: the blocks that lose their SE blocks; None means all of them.

    Raises:
        UnsupportedModelError: a block has become an instance of another class since its edit.
    """
    blocks = [block for block in injected(model) if names is None or block[0] in names]
    for _, module, edit in blocks:
        if type(module) is not edit.block_class:
            raise UnsupportedModelError(
                f"a block has become {type(module).__name__} since inject_se, as sharding does."
                " Remove the SE blocks before that step."
            )
    _restore_all([(module, edit) for _, module, edit in blocks])


def _restore_all(blocks: Sequence[tuple[nn.Module, Edit]]) -> None:
    """Undo the edits of all blocks, or of none of them if that is interrupted."""

    def restore_each() -> None:
        for module, edit in blocks:
            _restore(module, edit)

    all_or_nothing(restore_each, [ModuleState.of(module) for module, _ in blocks])


def _edit(
    base: type[nn.Module],
    block: TracedBlock,
    sites: Sequence[Site],
    before: tuple[str, ...],
    settings: Settings,
) -> Edit:
    """The edit that a block will get. Its generated class is made here too."""
    children = tuple(site.child for site in sites)
    around = source_around(block.eval, sites, f"SE{base.__name__}.forward")

    def source(forward: TracedForward, mode: int, label: str) -> ForwardSource:
        if around is not None:
            return around
        where = [site.where[mode] for site in sites]
        graph = edit_graph(forward.graph, where, children, fuse=not settings.custom)
        return ForwardSource.of(graph, f"SE{base.__name__}.{label}")

    edit = Edit(
        base,
        children,
        tuple(map(_producer, sites)),
        before,
        eval=source(block.eval, 0, "forward"),
        train=None
        if around or block.train is block.eval
        else source(block.train, 1, "forward (train)"),
        settings=settings,
    )
    try:
        _ = edit.block_class  # The class is made now, while a failure leaves the model untouched.
    except Exception as error:  # a foreign __init_subclass__ may raise anything
        raise UnsupportedModelError(
            f"{base.__name__} cannot be subclassed ({error}). Pass exclude={sites[0].block!r}."
        ) from error
    return edit


def _producer(site: Site) -> str | None:
    """The child that makes the map, if it runs once and only the SE block reads its output.

    This has to hold in both modes.
    """
    targets = set()
    for where in site.where:
        source = where.source
        call = ("call_module", source.target)
        calls = [n for n in source.graph.nodes if (source.op, n.target) == (n.op, n.target) == call]
        alone = len(calls) == 1 and set(source.users) == set(where.readers)
        targets.add(str(source.target) if alone else None)
    return targets.pop() if len(targets) == 1 else None


def _state_of(module: nn.Module, child: str) -> str:
    """Where the module keeps the attribute that the child replaces (see ``Edit.before``)."""
    own = attributes_of(module)
    if child in own:
        return "__dict__"
    return next(
        (key for key in ("_modules", "_parameters", "_buffers") if child in own[key]), "absent"
    )


def _edit_block(name: str, module: nn.Module, edit: Edit, layers: Mapping[str, nn.Module]) -> None:
    """Give one block its SE blocks and its new class, and check that it really has them."""
    try:
        for child, layer in layers.items():
            setattr(module, child, layer)
        module.__class__ = edit.block_class
        fault = _fault(module, edit, layers)
    except _REFUSALS as error:
        fault = f"{type(error).__name__}: {first_line(error)}"
    if fault:
        raise UnsupportedModelError(
            f"{block_label(name)} ({edit.base.__name__}) does not take its SE block ({fault})."
            f" Leave it out: exclude={name!r}."
        )


def _fault(module: nn.Module, edit: Edit, layers: Mapping[str, nn.Module]) -> str:
    """What went wrong in the edit of a block, or an empty text."""
    if type(module) is not edit.block_class:
        return "its class refuses another __class__"
    for child, layer in layers.items():
        if module._modules.get(child) is not layer or getattr(module, child, None) is not layer:
            return f"its class hides or drops the attribute {child!r}"
    if getattr(module.forward, "__func__", None) is not vars(edit.block_class)["forward"]:
        return "it has another forward than its class"
    return ""


def _restore(module: nn.Module, edit: Edit) -> None:
    """Undo the edit of one block."""
    if type(module) is edit.block_class:
        object.__setattr__(module, "__class__", edit.base)
    own = attributes_of(module)
    for child, before in zip(edit.children, edit.before, strict=True):
        own["_modules"].pop(child, None)
        if before == "__dict__":
            own[child] = None
        elif before != "absent":
            own[before][child] = None
