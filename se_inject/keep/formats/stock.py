"""Injected model -> networks that need no se_inject: stock timm, ``torch.export``, ONNX.

The gate of an identity start is ``2 * sigmoid``; stock SE blocks have a plain sigmoid (of the
paper's variants, timm has those without biases: theirs are then 0). The factor
is only a parametrisation: with the layer that feeds the SE block doubled, and ``fc1`` halved
because it then sees doubled means, ``x * 2 sigmoid(f(x))`` is ``2x * sigmoid(f(2x / 2))``. Doubling
and halving are exact in floating point, so the outputs stay equal to the last bit.
"""

import copy
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from se_inject.edit.block_class import edit_of
from se_inject.errors import ExportError, NoSiteError, first_line
from se_inject.graph.record import block_label
from se_inject.keep.atomic import replacing
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import GATES
from se_inject.plan.checks import check_model


def to_stock(model: nn.Module) -> nn.Module:
    """The same network from timm's own classes: ``resnet50`` with SE blocks is a ``seresnet50``.

    The stock network is found by the name that timm gave the base, built, loaded strictly and
    compared with ``model`` on random images; ``model`` stays as it is.

    Returns:
        a new timm model in eval mode, on the CPU, with the weights of ``model``.

    Raises:
        NoSiteError: the model has no SE block.
        ExportError: timm has no such network (no variant of the block but the one without
            biases), or a gate's factor cannot be folded away; the message names it.
            ``torch.export`` takes such a model as it is.
    """
    check_model(model)
    _check_variant(model)
    with torch.random.fork_rng(devices=[]):
        architecture = _architecture(model)
        names = _stock_names(architecture)
        twin = copy.deepcopy(model).cpu().eval()
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
            check_equal(twin, stock.eval(), example_tensors(model), name)
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
            options.pop("bias", None)  # no biases are biases of 0
            if options:
                said = ", ".join(f"{option}={value!r}" for option, value in options.items())
                raise ExportError(
                    f"no network of timm has SE blocks with {said}, as {block_label(name)} has."
                    " `--format torch-export`, or torch.export.export(model, ...), needs none."
                )


def _add_biases(model: nn.Module) -> None:
    """Give the layers of SE blocks that have no biases such of 0, as stock blocks have them."""
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            for layer in (module.fc1, module.fc2):
                if layer.bias is None:
                    layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0].flatten()))


def fold_gates(model: nn.Module) -> None:
    """Turn every gate ``2 * sigmoid`` into a plain sigmoid, in place; outputs stay as they are.

    ``2 * hard_sigmoid`` into ``hard_sigmoid`` too, with every squeeze: doubled maps have doubled
    means, maxima and values.

    Raises:
        NoSiteError: the model has no SE block.
        ExportError: a gate is no multiple of the paper's (``1 + tanh``), or what feeds an SE block
            is no norm, convolution or Linear of its own, or does not feed it alone. Nothing is
            changed then.
    """
    uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    shared = Counter(
        id(p) for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values())
    )
    folds: list[tuple[nn.Module, SqueezeExcite, float]] = []
    found = False
    for name, module in model.named_modules():
        if (edit := edit_of(module)) is None:
            continue
        for child, feed in zip(edit.children, edit.feeds, strict=True):
            found = True
            layer = getattr(module, child)
            if not isinstance(layer, SqueezeExcite) or layer.gate_scale == 1.0:
                continue
            if layer.gate_scale is None:
                raise ExportError(
                    f"the gate of {block_label(name)}'s SE block is"
                    f" {GATES[layer.gate].formulas[layer.init]}, which is no multiple of"
                    f" {layer.gate}: there is no factor to fold."
                )
            source = None if feed is None else _last_affine(module.get_submodule(feed))
            if (
                source is None
                or uses[id(source)] > 1
                or any(shared[id(t)] > 1 for t in _affine(source))
            ):
                raise ExportError(
                    f"the SE block of {block_label(name)} scales the output of"
                    f" {feed or 'an operation'}, which is no norm or convolution that feeds it"
                    " alone: the factor 2 of its gate has nowhere to go."
                )
            folds.append((source, layer, layer.gate_scale))
    if not found:
        raise NoSiteError(f"{type(model).__name__} has no SE block; inject_se(model) makes them.")
    with torch.no_grad():
        for source, layer, factor in folds:
            for tensor in _affine(source):
                tensor.mul_(factor)
            layer.fc1.weight.div_(factor)
            layer.to_literal_gate()


def _affine(layer: nn.Module) -> list[Tensor]:
    """Weight and bias: the output is linear in both together."""
    tensors = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    return [t for t in tensors if isinstance(t, Tensor)]


def _last_affine(module: nn.Module) -> nn.Module | None:
    """The layer whose weight and bias scale the whole output of ``module``, if there is one."""
    if type(module) is nn.Sequential:
        children = [child for child in module if type(child) is not nn.Identity]
        return _last_affine(children[-1]) if children else None
    plain = type(module) in _affine_layers() and not parametrize.is_parametrized(module)
    ends = [getattr(module, name) for name in ("drop", "act") if hasattr(module, name)]
    if not plain or any(type(end) is not nn.Identity for end in ends):
        return None
    return module if isinstance(getattr(module, "weight", None), Tensor) else None


def _affine_layers() -> set[type[nn.Module]]:
    """Exact classes: timm's ScaledStdConv2d is a Conv2d that takes any scale out of its weight."""
    from timm.layers import BatchNormAct2d, LayerNorm, LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    layers: set[type[nn.Module]] = {nn.Conv2d, nn.Conv3d, nn.Linear, nn.GroupNorm, nn.LayerNorm}
    layers |= {nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d}
    return layers | {BatchNormAct2d, LayerNorm, LayerNorm2d}


# --- the stock network ---------------------------------------------------------------------------


def _architecture(model: nn.Module) -> str:
    config = getattr(model, "pretrained_cfg", None)
    if not config or not config.get("architecture"):
        raise ExportError(
            f"{type(model).__name__} is not from timm, and only timm has SE networks of other"
            " libraries' blocks. torch.export.export(model, ...) needs no stock network."
        )
    return str(config["architecture"])


def _stock_names(architecture: str) -> list[str]:
    """timm's names that are ``architecture`` with "se" put in: resnext50 -> seresnext50."""
    import timm

    return [
        name
        for name in timm.list_models()
        if any(
            name[i : i + 2] == "se" and name[:i] + name[i + 2 :] == architecture
            for i in range(len(name))
        )
    ]


def _build_stock(name: str, model: nn.Module) -> nn.Module:
    import timm

    stock: nn.Module = timm.create_model(
        name, num_classes=_num_classes(model), in_chans=_in_chans(model)
    )
    return stock.to(next(model.parameters()).dtype)


def _num_classes(model: nn.Module) -> int:
    """Of the classifier that is there: users put another one in its place."""
    find: Any = getattr(model, "get_classifier", None)
    head = None if find is None else find()
    width = getattr(head, "out_features", None)
    return int(width if width is not None else getattr(model, "num_classes", 1000))


def _in_chans(model: nn.Module) -> int:
    return int(next(p for p in model.parameters() if p.dim() == 4).shape[1])


def _difference(ours: dict[str, Tensor], stock: dict[str, Tensor]) -> str:
    for key in ours:
        if key not in stock:
            return f"it has no {key}"
        if ours[key].shape != stock[key].shape:
            return f"{key} is {list(stock[key].shape)} in it, {list(ours[key].shape)} here"
    return next((f"{key} is only in it" for key in stock if key not in ours), "")


# --- checks before anything is written -----------------------------------------------------------


def example_tensors(model: nn.Module) -> tuple[Any, ...]:
    """Random positional arguments like those that the model was recorded with, on the CPU.

    A batch of one becomes two: of one, a program would conclude that there is never another.

    Raises:
        ExportError: it was recorded with keyword arguments.
    """
    edit = next(edit for module in model.modules() if (edit := edit_of(module)))
    args, kwargs = edit.settings.example
    if kwargs:
        raise ExportError(
            f"the forward takes keyword arguments ({', '.join(kwargs)}); export it by hand."
        )
    dtype = next(p.dtype for p in model.parameters())
    generator = torch.Generator().manual_seed(0)
    batches = {t.shape[0] for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.dim()}

    def random(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = (2, *value.shape[1:]) if batches == {1} and value.dim() else value.shape
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    return tuple(pytree.tree_map(random, args))


# Of the largest output: several roundings of each dtype.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_equal(
    model: nn.Module, other: Callable[..., Any], args: tuple[Any, ...], name: str
) -> None:
    """Raise an :class:`ExportError` unless both give the same outputs up to rounding."""
    with torch.no_grad():
        outputs = [pytree.tree_leaves(f(*args)) for f in (model, other)]
    expected, got = ([t for t in leaves if isinstance(t, Tensor)] for leaves in outputs)
    try:
        for a, b in zip(got, expected, strict=True):
            scale = b.abs().max().item() if b.is_floating_point() and b.numel() else 0.0
            atol = _TOLERANCE.get(b.dtype, 0.0) * (scale or 1.0)
            torch.testing.assert_close(a, b, rtol=0, atol=atol)
    except (AssertionError, ValueError) as error:
        raise ExportError(
            f"{name} gives other outputs than the model ({first_line(error)}); nothing is written."
        ) from error


# --- files ---------------------------------------------------------------------------------------


def write_stock(model: nn.Module, path: Path) -> str:
    """Write the weights of :func:`to_stock` as ``.safetensors``; returns what loads them."""
    from safetensors.torch import save_file

    stock = to_stock(model)
    with replacing(path, ".safetensors") as part:
        save_file({k: v.contiguous() for k, v in stock.state_dict().items()}, part)
    name = _architecture(stock)
    options = {"num_classes": (_num_classes(model), 1000), "in_chans": (_in_chans(model), 3)}
    given = "".join(f", {k}={v}" for k, (v, default) in options.items() if v != default)
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}{given})"


def write_torch_export(model: nn.Module, path: Path) -> None:
    """Write a ``torch.export`` program (``.pt2``); what is read back is compared with the model."""
    model = copy.deepcopy(model).cpu().eval()
    args = example_tensors(model)
    with replacing(path, ".pt2") as part:
        torch.export.save(_program(model, args), part)
        check_equal(model, torch.export.load(part).module(), args, "the exported program")


def write_onnx(model: nn.Module, path: Path) -> None:
    """Write an ONNX file, compared with the model in onnxruntime."""
    for name in ("onnxruntime", "onnxscript"):  # torch writes ONNX through the second
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"there is no {name}: pip install 'se-inject[onnx]'.")
    import onnxruntime

    model = copy.deepcopy(model).cpu().eval()
    args = example_tensors(model)
    program = _program(model, args)
    with replacing(path, ".onnx") as part:
        try:
            torch.onnx.export(program, (), part, dynamo=True, external_data=False, verbose=False)
            session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        except Exception as error:  # of two libraries, about operations and dtypes they lack
            raise ExportError(
                f"ONNX cannot hold {type(model).__name__} ({first_line(error)[:200]})."
            ) from error
        names = [entry.name for entry in session.get_inputs()]

        def run(*values: Any) -> list[Tensor]:
            tensors = [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
            inputs = dict(zip(names, (t.numpy() for t in tensors), strict=True))
            return [torch.from_numpy(output) for output in session.run(None, inputs)]

        check_equal(model, run, args, "the ONNX file")


def _program(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The eval forward, for any batch size that the model allows."""
    batch = {0: torch.export.Dim.AUTO}
    shapes = pytree.tree_map(lambda v: batch if isinstance(v, Tensor) and v.dim() else None, args)
    try:
        return torch.export.export(model, args, dynamic_shapes=shapes)
    except Exception as error:  # of torch's tracer, about foreign code
        raise ExportError(
            f"torch.export cannot follow {type(model).__name__} ({first_line(error)[:200]})."
        ) from error
