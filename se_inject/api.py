"""``inject_se``, ``remove_se``, ``se_parameters`` and ``set_plain_ops``: what most users call."""

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from se_inject.edit.insert import injected, is_injected, restore
from se_inject.errors import NoSiteError
from se_inject.layers.attention import SELayer
from se_inject.layers.deployed import DeployedSE
from se_inject.layers.gates import Gate, Init
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.squeezes import Squeeze
from se_inject.names import Patterns
from se_inject.plan.injection import Ratio
from se_inject.plan.planner import plan_se
from se_inject.plan.select import selected
from se_inject.sites.placements import Placement
from se_inject.sites.scaled import Where


def inject_se(
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
) -> nn.Module:
    """Put an SE block on every residual branch of ``model``, in place, and return the model.

    In a network without residual additions (VGG, Inception, DenseNet, ...) they go on the ends of
    its units instead; ``where`` chooses.

    The same object comes back, with every old ``state_dict`` key and tensor, its hooks, its
    frozen parameters and its train/eval mode; only ``<block>.se.*`` keys are new. With the
    default ``init`` the outputs are equal to the last bit until training moves the SE blocks.
    Each edited block is an instance of a subclass of its class (``SEBottleneck`` of
    ``Bottleneck``). If anything fails, the model is as it was.

    >>> import timm
    >>> model = inject_se(timm.create_model("resnet18"))  # pretrained=True for real weights
    >>> type(model.layer1[0]).__name__, type(model.layer1[0].se).__name__
    ('SEBasicBlock', 'SqueezeExcite')

    The arguments (placement, squeeze, gate and bias make the paper's variants) and errors are
    those of :func:`plan_se`, which only says what would be done. Blocks that look residual and get
    no SE block are a warning in one line, and an error with ``strict=True``.
    """
    plan = plan_se(
        model,
        r,
        where=where,
        example_input=example_input,
        include=include,
        exclude=exclude,
        placement=placement,
        squeeze=squeeze,
        gate=gate,
        bias=bias,
        shift=shift,
        init=init,
        divisor=divisor,
        se_layer=se_layer,
        strict=strict,
    )
    if plan.gaps:
        warnings.warn(plan.gaps, stacklevel=2)
    return plan.apply()


def remove_se(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> nn.Module:
    """Take the SE blocks out again, in place, and return the model.

    Every block gets back its class and forward; the ``<block>.se.*`` keys are gone and all other
    tensors stay as they are (trained, if they were trained).

    Args:
        include, exclude: glob or globs on the names of blocks that have SE blocks ("layer4.*");
            exclude wins. By default all of them lose their SE blocks.

    Raises:
        SEInjectError: the model has no SE block that se_inject put there.
        ArgumentError: a glob matches no block with an SE block.
    """
    names = [name for name, _, _ in injected(model)]
    if not names:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block from inject_se, so there is none to remove."
        )
    restore(model, selected(names, include, exclude, "block with an SE block"))
    return model


def set_plain_ops(model: nn.Module, plain: bool = True) -> nn.Module:
    """Make the SE blocks compute with mean, multiply and add, in place, and return the model.

    SE blocks squeeze with a sum and end in one pass of ``torch.addcmul``, which is faster.
    Converters and quantizers for devices (Core ML, the quantizers of PT2E, fixed accelerators)
    expect the operations that networks are usually written with. Outputs differ by roundings only,
    and not at all while every gate is 1. Parameters, keys and files are the same.
    ``set_plain_ops(model, False)`` goes back.

    >>> import timm
    >>> model = set_plain_ops(inject_se(timm.create_model("resnet18"))).eval()

    A ``se_layer`` of the user's own stays as it is.

    Raises:
        NoSiteError: the model has no SE block.
    """
    blocks = [
        module for module in model.modules() if isinstance(module, SqueezeExcite | DeployedSE)
    ]
    if not blocks and not is_injected(model):
        raise NoSiteError(
            f"{type(model).__name__} has no SE block whose operations could be changed."
        )
    for block in blocks:
        block.set_plain(plain)
    return model


def se_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that :func:`inject_se` added, block by block (weights and biases)."""
    for _, module, edit in injected(model):
        for child in edit.children:
            yield from module.get_submodule(child).parameters()
