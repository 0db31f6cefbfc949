"""Plan -> edited model, and back. The only file that changes a graph or a model.

What happens to a block whose forward ends in ``x = self.bn2(x); x += shortcut``:

before::

    bn2 = self.bn2(conv2)
    add = bn2 + shortcut

after::

    bn2 = self.bn2(conv2)
    se = self.se(bn2, shortcut)

and, where stochastic depth or a layer scale stands between, ``drop_path = self.drop_path(bn2)``
becomes ``se = self.se(bn2); drop_path = self.drop_path(se)``. The block's class becomes a
subclass with this forward; nothing else of the model changes.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from se_inject.checks import Placement
from se_inject.errors import NoSiteError, UnsupportedModelError
from se_inject.plan import Patterns, Plan, Ratio, SELayer, Site, is_injected, plan_se
from se_inject.record import block_label
from se_inject.sites import ResidualSite
from se_inject.squeeze_excite import Init
from se_inject.trace import TracedBlock, compile_forward


def inject_se(
    model: nn.Module,
    r: Ratio = 16,
    *,
    example_input: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    placement: Placement = "standard",
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

    The arguments and errors are those of :func:`plan_se`, which only says what would be done.
    """
    return plan_se(
        model,
        r,
        example_input=example_input,
        include=include,
        exclude=exclude,
        placement=placement,
        init=init,
        divisor=divisor,
        se_layer=se_layer,
    ).apply()


def apply_plan(plan: Plan) -> nn.Module:
    """Carry out a plan on its model, wholly or not at all; see :meth:`Plan.apply`."""
    by_block: dict[str, list[Site]] = {}
    for site in plan.sites:
        by_block.setdefault(site.block, []).append(site)
    classes: dict[tuple[Any, ...], type[nn.Module]] = {}
    modules = dict(plan.model.named_modules())
    for name in by_block:
        module = modules.get(name)
        if module is not plan.modules[name] or is_injected(module):
            raise UnsupportedModelError(
                f"{block_label(name)} was replaced or injected since the plan was made. Plan anew."
            )
    with torch.inference_mode(False):  # weights made in inference mode could never learn
        edits = [_prepare(plan, name, sites, classes) for name, sites in by_block.items()]
    done: list[nn.Module] = []
    try:
        for module, new_class, layers in edits:
            done.append(module)
            for child, layer in layers.items():
                setattr(module, child, layer)
            module.__class__ = new_class
    except BaseException:  # a Ctrl-C too must not leave half a network
        for module, new_class, _ in edits[: len(done)]:
            _restore(module, new_class)
        raise
    return plan.model


def remove_se(model: nn.Module) -> nn.Module:
    """Take the SE blocks out again, in place, and return the model.

    Every block gets back its class and forward; the ``<block>.se.*`` keys are gone and all other
    tensors stay as they are (trained, if they were trained).

    Raises:
        SEInjectError: the model has no SE block that se_inject put there.
    """
    injected = [module for module in model.modules() if is_injected(module)]
    if not injected:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block from inject_se, so there is none to remove."
        )
    for module in injected:
        if "_se_inject" not in vars(type(module)):
            raise UnsupportedModelError(
                f"a block has become {type(module).__name__} since inject_se (sharded?)."
                " Remove the SE blocks before that step."
            )
    for module in injected:
        _restore(module, type(module))
    return model


def se_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that :func:`inject_se` added, block by block (weights and biases)."""
    for module in model.modules():
        if is_injected(module):
            for child in _record_of(type(module)).children:
                yield from module.get_submodule(child).parameters()


# --- one block ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """What an edited class remembers, to undo the edit: it rides on the class, not the instance,
    so that copies and checkpoints of the instance need to know nothing of it.
    """

    base: type[nn.Module]
    children: tuple[str, ...]
    # How the attribute was before: "absent", None in "__dict__", or None in "_modules".
    before: tuple[str, ...]


def _record_of(cls: type[nn.Module]) -> _Record:
    record: _Record = cls._se_inject  # type: ignore[attr-defined]
    return record


def _prepare(
    plan: Plan,
    name: str,
    sites: list[Site],
    classes: dict[tuple[Any, ...], type[nn.Module]],
) -> tuple[nn.Module, type[nn.Module], dict[str, nn.Module]]:
    """Everything for one block that can fail, made before the model is touched."""
    module = plan.modules[name]
    layers = {site.child: plan.make_layer(site).train(module.training) for site in sites}
    children = tuple(layers)
    before = tuple(_state_of(module, child) for child in children)
    block = plan.blocks[name]
    key = (type(module), id(block.eval), id(block.train), children, before)
    if key not in classes:
        record = _Record(type(module), children, before)
        classes[key] = _edited_class(record, block, sites, plan.se_layer is None)
    return module, classes[key], layers


def _state_of(module: nn.Module, child: str) -> str:
    if child in vars(module):
        return "__dict__"
    return "_modules" if child in module._modules else "absent"


def _restore(module: nn.Module, edited: type[nn.Module]) -> None:
    """Undo the edit of one block, or the part of it that was done."""
    record = _record_of(edited)
    if type(module) is edited:
        module.__class__ = record.base
    for child, before in zip(record.children, record.before, strict=True):
        module._modules.pop(child, None)
        if before == "__dict__":
            vars(module)[child] = None
        elif before == "_modules":
            module._modules[child] = None


def _edited_class(
    record: _Record, block: TracedBlock, sites: list[Site], fuse: bool
) -> type[nn.Module]:
    """A subclass of the block's class whose forward calls the SE children."""
    name = f"SE{record.base.__name__}"
    children = record.children
    in_eval = [site.where[0] for site in sites]
    forward = compile_forward(
        edit_graph(block.eval.graph, in_eval, children, fuse), f"{name}.forward"
    )
    if block.train is not block.eval:
        in_train = [site.where[1] for site in sites]
        forward_eval = forward
        forward_train = compile_forward(
            edit_graph(block.train.graph, in_train, children, fuse), f"{name}.forward (train)"
        )

        @functools.wraps(forward_eval)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return (forward_train if self.training else forward_eval)(self, *args, **kwargs)

    members = {
        "__module__": record.base.__module__,
        "__doc__": record.base.__doc__,
        "_se_inject": record,
        "forward": forward,
    }
    try:
        return type(name, (record.base,), members)
    except TypeError as error:  # an __init_subclass__ that wants arguments
        raise UnsupportedModelError(
            f"{record.base.__name__} cannot be subclassed ({error}): exclude {sites[0].block!r}."
        ) from error


def edit_graph(
    graph: fx.Graph, sites: list[ResidualSite], children: tuple[str, ...], fuse: bool = True
) -> fx.Graph:
    """A copy of a block graph with one ``call_module`` node for each SE block.

    The other nodes stay, in their order: a graph with in-place operations has no dead code.
    """
    edited = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    edited.output(edited.graph_copy(graph, copies))
    for site, child in zip(sites, children, strict=True):
        addition, branch = copies[site.addition], copies[site.branch]
        if site.fused and fuse:
            with edited.inserting_after(addition):
                se = edited.call_module(child, (branch, copies[site.shortcut]))
            addition.replace_all_uses_with(se)
            edited.erase_node(addition)
            copies[site.addition] = se
        else:
            reader = copies[site.reader]
            with edited.inserting_before(reader):
                se = edited.call_module(child, (branch,))
            reader.replace_input_with(branch, se)
    edited.lint()
    return edited
