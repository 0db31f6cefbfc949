"""Records the gates of a model's SE blocks while it runs.

A forward hook on the ``gate`` of an SE block sees what the branch is multiplied by. A watched gate
is multiplied by its factor before the sum. The factor is a power of two, so no bit changes.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import edit_of
from se_inject.errors import NoSiteError, UnsupportedModelError, warn
from se_inject.layers.squeeze_excite import SqueezeExcite

# An observer gets the name of an SE block, the block itself, and its whole gate. The gate is a
# tensor such as [N, C, 1, 1], without gradient.
Observer = Callable[[str, SqueezeExcite, Tensor], None]


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the gates of every SE block while the model runs.

    >>> import timm, torch
    >>> from se_inject import inject_se
    >>> model = inject_se(timm.create_model("resnet18"))
    >>> with record_gates(model) as gates:
    ...     _ = model(torch.randn(2, 3, 64, 64))
    >>> gates["layer1.0"].shape
    torch.Size([2, 64])

    The dict maps the name of each block that ran to its gate [N, C]. The gate has no gradient, and
    it has the dtype and the device with which the block computed it. If a block has several SE
    blocks, each of them has a name (``layer1.0.se2``). Each call of an SE block replaces the gate
    of the call before, so only the last one is kept. With ``squeeze="none"`` the gate differs from
    position to position, and the dict has its mean over the positions.

    The outputs are equal to the last bit to those without the recording. This holds in eval and
    train mode and under autocast. No hook stays behind. If the model is wrapped for distributed
    runs, each process records the images that it sees. A compiled model runs uncompiled while it is
    recorded, because compiled code ignores hooks, and a warning says so.

    Raises:
        NoSiteError: the model has no SE block whose gates are known.
        UnsupportedModelError: the model is in a ``DataParallel``, whose copies have no names.
    """
    gates: dict[str, Tensor] = {}

    def keep(name: str, layer: SqueezeExcite, gate: Tensor) -> None:
        gates[name] = mean_over_positions(layer, gate)

    with observed(model, keep):
        yield gates


@contextlib.contextmanager
def observed(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer`` with the gate of every SE block each time that the block runs."""
    layers = gated_layers(model)
    if any(_is_compiled(module) for module in model.modules()):
        warn(
            "the model is compiled, and compiled code ignores hooks. It runs uncompiled while its"
            " gates are recorded."
        )
    with contextlib.ExitStack() as stack:
        # The code around the model can be compiled too, which the model does not show. PyTorch's
        # compiler takes seconds to import. If nobody has imported it, nothing is compiled.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, layer in layers.items():
            handle = layer.gate.register_forward_hook(_hook(name, layer, observer))
            stack.callback(handle.remove)
        yield


def gated_layers(model: nn.Module) -> dict[str, SqueezeExcite]:
    """The SE blocks of a model by the name of their block, or by their own if it has several.

    Raises:
        NoSiteError: the model has no SE block whose gates are known.
        UnsupportedModelError: the model is in a ``DataParallel``.
    """
    inner = _unwrapped(model)
    names: dict[int, str] = {}
    other = 0
    for name, module in inner.named_modules():
        if edit := edit_of(module):
            for child in edit.children:
                own = f"{name}.{child}".lstrip(".")
                names[id(getattr(module, child))] = name if len(edit.children) == 1 else own
                other += not isinstance(getattr(module, child), SqueezeExcite)
        elif isinstance(module, SqueezeExcite):  # somebody has put it in by hand
            names.setdefault(id(module), name)
    layers = {
        names[id(module)]: module
        for module in inner.modules()
        if isinstance(module, SqueezeExcite) and id(module) in names
    }
    if not layers:
        why = (
            f"its {other} layers of another se_layer are no SqueezeExcite, whose gates are known"
            if other
            else "inject_se(model) makes them"
        )
        raise NoSiteError(f"{type(inner).__name__} has no SE block with a gate: {why}.")
    return layers


def mean_over_positions(layer: SqueezeExcite, gate: Tensor) -> Tensor:
    """Reduce a whole gate, such as [N, C, 1, 1], to [N, C]."""
    if layer.squeeze == "none":
        return gate.mean(layer.space)
    return gate.flatten(1)


def _hook(name: str, layer: SqueezeExcite, observer: Observer) -> Callable[..., None]:
    def hook(gate: nn.Module, args: Any, output: Tensor) -> None:
        # Code that is compiled now would call the observer for good.
        if not torch.compiler.is_compiling():
            observer(name, layer, output.detach())

    return hook


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of ``torch.compile`` and of distributed runs."""
    inner: Any = model
    while True:
        kind = type(inner).__name__
        if kind == "DataParallel":
            raise UnsupportedModelError(
                "the model is in a DataParallel, which runs copies of it. Record the gates of"
                " `model.module`."
            )
        if kind == "OptimizedModule":
            inner = inner._orig_mod
        elif kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            inner = inner.module
        else:
            break
    unwrapped: nn.Module = inner
    return unwrapped
