"""Sites -> edited model, and back.

An edit gives a block its SE children and makes the block an instance of a generated subclass of
its class, whose forward calls them. Nothing else of the model changes. How the forward itself
changes is shown in :mod:`se_inject.edit.rewrite`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from se_inject.edit.block_class import Edit, Settings, edit_of
from se_inject.edit.rewrite import edit_graph
from se_inject.edit.site import Site, make_layer
from se_inject.errors import UnsupportedModelError
from se_inject.graph.facts import TracedForward
from se_inject.graph.record import Arguments
from se_inject.graph.source import ForwardSource
from se_inject.graph.trace import TracedBlock
from se_inject.layers.attention import SELayer
from se_inject.layers.variant import Variant
from se_inject.names import block_label


def insert(
    model: nn.Module,
    sites: Sequence[Site],
    modules: Mapping[str, nn.Module],
    blocks: Mapping[str, TracedBlock],
    *,
    variant: Variant,
    se_layer: SELayer | None,
    example: Arguments,
) -> nn.Module:
    """Insert SE blocks at all sites, or at none of them if anything fails.

    Args:
        model: it is edited in place and returned.
        sites: where the SE blocks go; their graph nodes are those of ``blocks``.
        modules, blocks: of each block that has a site, the module and its graphs.
        variant, se_layer: what is inserted.
        example: what the forward was recorded with, on meta; a checkpoint says it again.

    Raises:
        UnsupportedModelError: a block is not the one that was planned any more, or its class
            cannot be subclassed.
    """
    by_block: dict[str, list[Site]] = {}
    for site in sites:
        by_block.setdefault(site.block, []).append(site)
    present = dict(model.named_modules())
    for name in by_block:
        if present.get(name) is not modules[name] or edit_of(modules[name]):
            raise UnsupportedModelError(
                f"{block_label(name)} was replaced or injected since the plan was made. Plan anew."
            )
    # Everything that can fail is made before the model is touched.
    edits: dict[tuple[Any, ...], Edit] = {}
    prepared: list[tuple[nn.Module, Edit, dict[str, nn.Module]]] = []
    with torch.inference_mode(False):  # Weights made in inference mode could never learn.
        for name, own in by_block.items():
            module, block = modules[name], blocks[name]
            layers = {
                site.child: make_layer(site, variant, se_layer).train(module.training)
                for site in own
            }
            settings = Settings(
                r=tuple(site.r for site in own),
                variant=variant,
                custom=se_layer is not None,
                example=example,
            )
            before = tuple(_state_of(module, child) for child in layers)
            key = (type(module), id(block.eval), id(block.train), tuple(layers), before, settings.r)
            if key not in edits:
                edits[key] = _edit(type(module), block, own, before, settings)
            prepared.append((module, edits[key], layers))
    done = 0
    try:
        for module, edit, layers in prepared:
            done += 1
            for child, layer in layers.items():
                setattr(module, child, layer)
            module.__class__ = edit.block_class
    except BaseException:  # A Ctrl-C must not leave half a network either.
        for module, edit, _ in prepared[:done]:
            _restore(module, edit)
        raise
    return model


def withdraw(modules: Mapping[str, nn.Module]) -> None:
    """Take the SE blocks out of these modules again, and out of no other module."""
    for module in modules.values():
        if edit := edit_of(module):
            _restore(module, edit)


def injected(model: nn.Module) -> Iterator[tuple[str, nn.Module, Edit]]:
    """The blocks of a model that have SE blocks: name, module and what was done to it.

    A block that is reached by two names comes once.
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
        names: only out of the blocks of these names.

    Raises:
        UnsupportedModelError: a block was made an instance of another class since.
    """
    blocks = [block for block in injected(model) if names is None or block[0] in names]
    for _, module, edit in blocks:
        if type(module) is not edit.block_class:
            raise UnsupportedModelError(
                f"a block has become {type(module).__name__} since inject_se (sharded?)."
                " Remove the SE blocks before that step."
            )
    for _, module, edit in blocks:
        _restore(module, edit)


def _edit(
    base: type[nn.Module],
    block: TracedBlock,
    sites: Sequence[Site],
    before: tuple[str, ...],
    settings: Settings,
) -> Edit:
    """What is to be done to a block, with its generated class."""
    children = tuple(site.child for site in sites)

    def source(forward: TracedForward, mode: int, label: str) -> ForwardSource:
        where = [site.where[mode] for site in sites]
        graph = edit_graph(forward.graph, where, children, fuse=not settings.custom)
        return ForwardSource.of(graph, f"SE{base.__name__}.{label}")

    edit = Edit(
        base,
        children,
        tuple(map(_producer, sites)),
        before,
        eval=source(block.eval, 0, "forward"),
        train=None if block.train is block.eval else source(block.train, 1, "forward (train)"),
        settings=settings,
    )
    try:
        _ = edit.block_class  # The class is made here, where nothing is touched if that fails.
    except Exception as error:  # whatever a foreign __init_subclass__ raises
        raise UnsupportedModelError(
            f"{base.__name__} cannot be subclassed ({error}): exclude {sites[0].block!r}."
        ) from error
    return edit


def _producer(site: Site) -> str | None:
    """The child that runs once and whose output the SE block alone reads, in both modes."""
    targets = set()
    for where in site.where:
        source = where.source
        calls = [
            n for n in source.graph.nodes if (n.op, n.target) == ("call_module", source.target)
        ]
        alone = len(calls) == 1 and set(source.users) == set(where.readers)
        targets.add(str(source.target) if alone else None)
    return targets.pop() if len(targets) == 1 else None


def _state_of(module: nn.Module, child: str) -> str:
    if child in vars(module):
        return "__dict__"
    return "_modules" if child in module._modules else "absent"


def _restore(module: nn.Module, edit: Edit) -> None:
    """Undo the edit of one block, or the part of it that was done."""
    if type(module) is edit.block_class:
        module.__class__ = edit.base
    for child, before in zip(edit.children, edit.before, strict=True):
        module._modules.pop(child, None)
        if before == "__dict__":
            vars(module)[child] = None
        elif before == "_modules":
            module._modules[child] = None
