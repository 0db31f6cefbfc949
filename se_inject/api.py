"""``inject_se``, ``remove_se``, ``se_parameters`` and ``set_plain_ops``: what most users call."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from se_inject.edit.insert import injected, is_injected, restore
from se_inject.errors import NoSiteError, warn
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

    In a network without residual additions (VGG, Inception, DenseNet, ...) the SE blocks go on the
    ends of its units instead. The argument ``where`` decides this.

    The call returns the same object. It keeps every old ``state_dict`` key and tensor, its hooks,
    its frozen parameters and its train or eval mode. Only the ``<block>.se.*`` keys are new. With
    the default ``init``, the outputs stay equal to the last bit until training changes the SE
    blocks. Each edited block becomes an instance of a subclass of its class: a ``Bottleneck``
    becomes an ``SEBottleneck``. If anything fails, the model stays as it was.

    >>> import timm
    >>> model = inject_se(timm.create_model("resnet18"))  # pretrained=True for real weights
    >>> type(model.layer1[0]).__name__, type(model.layer1[0].se).__name__
    ('SEBasicBlock', 'SqueezeExcite')

    The arguments and the errors are the same as those of :func:`plan_se`, which only reports what
    would be done. ``placement``, ``squeeze``, ``gate`` and ``bias`` make the paper's variants. If
    blocks that look residual get no SE block, a warning of one line says so. With ``strict=True``
    this is an error.
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
        warn(plan.gaps)
    return plan.apply()


def remove_se(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> nn.Module:
    """Take the SE blocks out again, in place, and return the model.

    Every block gets its old class and forward back. The ``<block>.se.*`` keys disappear. All other
    tensors keep their values, including what training has changed in them.

    Args:
        include, exclude: one glob or several globs on the names of the blocks that have SE blocks,
            such as ``"layer4.*"``. Where both match a block, ``exclude`` wins. By default every
            block loses its SE blocks.

    Raises:
        NoSiteError: the model has no SE block that se_inject inserted.
        ArgumentError: a glob matches no block that has an SE block.
        UnsupportedModelError: another tool, such as sharding, has changed the class of a block
            since the injection.
    """
    names = [name for name, _, _ in injected(model)]
    if not names:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block from inject_se, so there is none to remove."
        )
    restore(model, selected(names, include, exclude, "block with an SE block"))
    return model


def set_plain_ops(model: nn.Module, plain: bool = True) -> nn.Module:
    """Make the SE blocks compute with plain operations, in place, and return the model.

    Normally an SE block runs its layers as matrix products and ends in one call of
    ``torch.addcmul``, because that is faster, and on CUDA it runs as Triton kernels. Converters and
    quantizers for devices (Core ML, the quantizers of PT2E, fixed accelerators) expect the
    operations with which networks are usually written: a mean, convolutions, a product and a sum.
    The outputs differ by rounding only, and while every gate is 1 they do not differ at all.
    Parameters, keys and files stay the same. ``set_plain_ops(model, False)`` switches back.

    >>> import timm
    >>> model = set_plain_ops(inject_se(timm.create_model("resnet18"))).eval()

    Layers that a user's own ``se_layer`` made stay as they are.

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
    """Yield the parameters that :func:`inject_se` added: weights and biases, block by block."""
    for _, module, edit in injected(model):
        for child in edit.children:
            yield from module.get_submodule(child).parameters()
