"""Plan -> edited model, and back. The only file that changes a graph or a model.

What happens to a block whose forward ends in ``x = self.bn2(x); x += shortcut``:

before::

    bn2 = self.bn2(conv2)
    bn2 += shortcut;  iadd = bn2

after::

    bn2 = self.bn2(conv2)
    se = self.se(bn2, shortcut, in_place = True)

and, where stochastic depth or a layer scale stands between, ``drop_path = self.drop_path(bn2)``
becomes ``se = self.se(bn2); drop_path = self.drop_path(se)``. So it is with the other placements:
the readers of a map read ``self.se`` of it. The block's class becomes a subclass with this
forward; nothing else of the model changes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from se_inject.edit.block_class import Edit, ForwardSource, Settings, edit_of
from se_inject.errors import NoSiteError, UnsupportedModelError
from se_inject.graph.record import block_label
from se_inject.graph.trace import TracedBlock, TracedForward
from se_inject.layers.variant import Gate, Init, Placement, Squeeze
from se_inject.plan.planner import Patterns, Plan, Ratio, SELayer, Site, plan_se
from se_inject.sites.residual import ResidualSite


def inject_se(
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
) -> nn.Module:
    """Put an SE block on every residual branch of ``model``, in place, and return the model.

    The same object comes back, with every old ``state_dict`` key and tensor, its hooks, its
    frozen parameters and its train/eval mode; only ``<block>.se.*`` keys are new. With the
    default ``init`` the outputs are equal to the last bit until training moves the SE blocks.
    Each edited block is an instance of a subclass of its class (``SEBottleneck`` of
    ``Bottleneck``). If anything fails, the model is as it was.

    >>> model = inject_se(timm.create_model("resnet50", pretrained=True))

    The arguments (placement, squeeze, gate and bias make the paper's variants) and errors are
    those of :func:`plan_se`, which only says what would be done.
    """
    return plan_se(
        model,
        r,
        example_input=example_input,
        include=include,
        exclude=exclude,
        placement=placement,
        squeeze=squeeze,
        gate=gate,
        bias=bias,
        init=init,
        divisor=divisor,
        se_layer=se_layer,
    ).apply()


def apply_plan(plan: Plan) -> nn.Module:
    """Carry out a plan on its model, wholly or not at all; see :meth:`Plan.apply`."""
    by_block: dict[str, list[Site]] = {}
    for site in plan.sites:
        by_block.setdefault(site.block, []).append(site)
    edits: dict[tuple[Any, ...], Edit] = {}
    modules = dict(plan.model.named_modules())
    for name in by_block:
        module = modules.get(name)
        if module is not plan.modules[name] or edit_of(module):
            raise UnsupportedModelError(
                f"{block_label(name)} was replaced or injected since the plan was made. Plan anew."
            )
    with torch.inference_mode(False):  # weights made in inference mode could never learn
        prepared = [_prepare(plan, name, sites, edits) for name, sites in by_block.items()]
    done = 0
    try:
        for module, edit, layers in prepared:
            done += 1
            for child, layer in layers.items():
                setattr(module, child, layer)
            module.__class__ = edit.block_class
    except BaseException:  # a Ctrl-C too must not leave half a network
        for module, edit, _ in prepared[:done]:
            _restore(module, edit)
        raise
    return plan.model


def withdraw_plan(plan: Plan) -> None:
    """Take out what :func:`apply_plan` put in, and no SE block that was there before."""
    for name in {site.block for site in plan.sites}:
        if edit := edit_of(plan.modules[name]):
            _restore(plan.modules[name], edit)


def remove_se(model: nn.Module) -> nn.Module:
    """Take the SE blocks out again, in place, and return the model.

    Every block gets back its class and forward; the ``<block>.se.*`` keys are gone and all other
    tensors stay as they are (trained, if they were trained).

    Raises:
        SEInjectError: the model has no SE block that se_inject put there.
    """
    injected = [(module, edit) for module in model.modules() if (edit := edit_of(module))]
    if not injected:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block from inject_se, so there is none to remove."
        )
    for module, edit in injected:
        if type(module) is not edit.block_class:
            raise UnsupportedModelError(
                f"a block has become {type(module).__name__} since inject_se (sharded?)."
                " Remove the SE blocks before that step."
            )
    for module, edit in injected:
        _restore(module, edit)
    return model


def se_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that :func:`inject_se` added, block by block (weights and biases)."""
    for module in model.modules():
        if edit := edit_of(module):
            for child in edit.children:
                yield from module.get_submodule(child).parameters()


# --- one block ---------------------------------------------------------------------------------


def _prepare(
    plan: Plan, name: str, sites: list[Site], edits: dict[tuple[Any, ...], Edit]
) -> tuple[nn.Module, Edit, dict[str, nn.Module]]:
    """Everything for one block that can fail, made before the model is touched."""
    module = plan.modules[name]
    layers = {site.child: plan.make_layer(site).train(module.training) for site in sites}
    children = tuple(layers)
    before = tuple(_state_of(module, child) for child in children)
    block = plan.blocks[name]
    ratios = tuple(site.r for site in sites)
    key = (type(module), id(block.eval), id(block.train), children, before, ratios)
    if key not in edits:
        edits[key] = _edit(plan, type(module), block, sites, children, before)
    return module, edits[key], layers


def _edit(
    plan: Plan,
    base: type[nn.Module],
    block: TracedBlock,
    sites: list[Site],
    children: tuple[str, ...],
    before: tuple[str, ...],
) -> Edit:
    fuse = plan.se_layer is None

    def source(forward: TracedForward, mode: int, label: str) -> ForwardSource:
        where = [site.where[mode] for site in sites]
        graph = edit_graph(forward.graph, where, children, fuse)
        return ForwardSource.of(graph, f"SE{base.__name__}.{label}")

    edit = Edit(
        base,
        children,
        tuple(map(_feed, sites)),
        before,
        eval=source(block.eval, 0, "forward"),
        train=None if block.train is block.eval else source(block.train, 1, "forward (train)"),
        settings=Settings(
            r=tuple(site.r for site in sites),
            variant=plan.variant,
            custom=plan.se_layer is not None,
            example=plan.example,
        ),
    )
    try:
        _ = edit.block_class  # made here, where nothing is touched if it fails
    except Exception as error:  # of a foreign __init_subclass__
        raise UnsupportedModelError(
            f"{base.__name__} cannot be subclassed ({error}): exclude {sites[0].block!r}."
        ) from error
    return edit


def _feed(site: Site) -> str | None:
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


def edit_graph(
    graph: fx.Graph, sites: list[ResidualSite], children: tuple[str, ...], fuse: bool = True
) -> fx.Graph:
    """A copy of a block graph with one ``call_module`` node for each SE block.

    The other nodes stay, in their order: a graph with in-place operations has no dead code.
    """
    edited = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    edited.output(edited.graph_copy(graph, copies))
    output = next(n for n in graph.nodes if n.op == "output")
    copies[output] = next(n for n in edited.nodes if n.op == "output")
    # What reads a map for a reader: an SE block that another site has put before it.
    stand_ins: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for site, child in zip(sites, children, strict=True):
        source = copies[site.source]
        if site.fused and fuse:
            addition = copies[site.addition]
            kind = {"residual_first": site.shortcut_first, "in_place": site.in_place}
            flags: dict[str, Any] = {name: True for name, value in kind.items() if value}
            with edited.inserting_after(addition):
                se = edited.call_module(child, (source, copies[site.shortcut]), flags)
            addition.replace_all_uses_with(se)
            edited.erase_node(addition)
            copies[site.addition] = se
            continue
        edges = [(site.source, reader) for reader in site.readers]
        readers = [stand_ins.get(edge) or copies[edge[1]] for edge in edges]
        with edited.inserting_before(min(readers)):
            se = edited.call_module(child, (source,))
        for reader in readers:
            reader.replace_input_with(source, se)
        stand_ins |= dict.fromkeys(edges, se)
    edited.lint()
    return edited
