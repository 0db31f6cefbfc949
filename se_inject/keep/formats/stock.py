"""Turns an injected model into timm's own SE network, which needs no se_inject.

The gate of an identity start is ``2 * sigmoid``, while that of a stock SE block is a plain sigmoid.
:func:`fold_gates` moves the factor 2 into the layer before the SE block and loses no bit. timm can
hold only one of the paper's variants: SE blocks without biases become stock blocks with biases 0.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import edit_of
from se_inject.errors import ExportError
from se_inject.keep.atomic import atomic_write
from se_inject.keep.fold import fold_gates
from se_inject.keep.formats.compare import check_equal, example_tensors
from se_inject.keep.formats.format import Format
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.models.head import num_classes_of
from se_inject.models.names import timm_names
from se_inject.names import base_architecture, block_label
from se_inject.plan.checks import check_model


def to_stock(model: nn.Module) -> nn.Module:
    """Build the same network from timm's classes: ``resnet50`` with SE becomes ``seresnet50``.

    The stock network is found by the name that timm gave the base. It is built, loaded strictly and
    compared with ``model`` on random images. ``model`` itself stays as it is.

    Returns:
        A new timm model in eval mode, on the CPU, with the weights of ``model``.

    Raises:
        NoSiteError: the model has no SE block.
        ExportError: timm has no such network, or the factor of a gate cannot be folded away. The
            message says which. Of the variants of the SE block, timm can hold only the one without
            biases. ``torch.export`` takes any such model as it is.
    """
    check_model(model)
    _check_variant(model)
    with torch.random.fork_rng(devices=[]):
        architecture = _architecture(model)
        names = _stock_names(architecture)
        twin = copy.deepcopy(model).cpu()
        twin.eval()
        if names:
            fold_gates(twin)
            _add_biases(twin)
        state = twin.state_dict()
        reasons = []
        for name in names:
            stock = _build_stock(name, model)
            keys = _difference(state, stock.state_dict())
            if keys:
                reasons.append(f"{name} differs: {keys}")
                continue
            stock.load_state_dict(state)
            stock.eval()
            check_equal(twin, stock, example_tensors(model), name)
            return stock
    tried = "; ".join(reasons) or "no name in timm is that of the base with 'se' in it"
    raise ExportError(
        f"timm has no network like {architecture} with these SE blocks ({tried})."
        " `--format torch-export`, or torch.export.export(model, ...), needs no stock network."
    )


def _check_variant(model: nn.Module) -> None:
    """Raise an :class:`ExportError` for a variant of the SE block that no stock network has."""
    for name, module in model.named_modules():
        if edit := edit_of(module):
            options = edit.settings.variant.differing()
            options.pop("bias", None)  # a block without biases is a block with biases of 0
            if options:
                said = ", ".join(f"{option}={value!r}" for option, value in options.items())
                raise ExportError(
                    f"no network of timm has SE blocks with {said}, as {block_label(name)} has."
                    " `--format torch-export`, or torch.export.export(model, ...), needs none."
                )


def _add_biases(model: nn.Module) -> None:
    """Give the layers of SE blocks biases of 0 if they have none, as stock blocks have biases."""
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            for layer in (module.fc1, module.fc2):
                if layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten()))


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    if not config or not config.get("architecture"):
        raise ExportError(
            f"{type(model).__name__} is not from timm, and only timm has SE networks of other"
            " libraries' blocks. torch.export.export(model, ...) needs no stock network."
        )
    return base_architecture(str(config["architecture"]))


def _stock_names(architecture: str) -> list[str]:
    """timm's names that are ``architecture`` with "se" inserted: resnext50 -> seresnext50."""
    return [
        name
        for name in timm_names()
        if any(
            name[i : i + 2] == "se" and name[:i] + name[i + 2 :] == architecture
            for i in range(len(name))
        )
    ]


def _build_stock(name: str, model: nn.Module) -> nn.Module:
    import timm

    stock: nn.Module = timm.create_model(
        name, num_classes=_classes(model), in_chans=_in_chans(model)
    )
    return stock.to(next(model.parameters()).dtype)


def _classes(model: nn.Module) -> int:
    classes = num_classes_of(model)
    return 1000 if classes is None else classes  # timm's own default


def _in_chans(model: nn.Module) -> int:
    return int(next(p for p in model.parameters() if p.dim() == 4).shape[1])


def _difference(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> str:
    for key in ours:
        if key not in stock:
            return f"it has no {key}"
        if ours[key].shape != stock[key].shape:
            return f"{key} is {list(stock[key].shape)} in it, {list(ours[key].shape)} here"
    return next((f"{key} is only in it" for key in stock if key not in ours), "")


def write_stock(model: nn.Module, path: Path) -> str:
    """Write the weights of :func:`to_stock`, compare what is read back, and say what loads them."""
    from safetensors.torch import load_file, save_file

    stock = to_stock(model)
    with atomic_write(path, STOCK.suffix) as part:
        save_file({k: v.contiguous() for k, v in stock.state_dict().items()}, part)
        with torch.random.fork_rng(devices=[]):
            again = _build_stock(_architecture(stock), model)
        again.load_state_dict(load_file(part))
        again.eval()
        twin = copy.deepcopy(model).cpu()
        twin.eval()
        check_equal(twin, again, example_tensors(model), "the stock file")
    options = {"num_classes": (_classes(model), 1000), "in_chans": (_in_chans(model), 3)}
    given = "".join(f", {k}={v}" for k, (v, default) in options.items() if v != default)
    return f"timm.create_model({_architecture(stock)!r}, checkpoint_path={str(path)!r}{given})"


STOCK = Format("the state dict of timm's own SE network", ".safetensors", write_stock)
