"""The parts of a model that are not Python code on floats: TorchScript and quantized layers.

They stay as they are. The copy on meta has a stand-in for each of them, which runs the part itself
on real tensors, because meta tensors have no rule for it.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.torch_private import pytree, without_torch_functions

_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is TorchScript."""
    return isinstance(module, torch.jit.ScriptModule)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a quantized layer. A FloatFunctional only waits for quantization."""
    kind = type(module)
    return kind.__module__.startswith(_QUANTIZED) and kind.__name__ not in (
        "FloatFunctional",
        "QFunctional",
        "FXFloatFunctional",
    )


def foreign_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of scripted parts and of modules with quantized layers, each with a reason."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, why in found.items() if "Script" in why):
            continue
        if is_scripted(module):
            found[name] = "it is TorchScript: inject into the Python module that it was made from"
        elif is_quantized(module):
            found[name.rpartition(".")[0]] = "it is quantized: inject first, then quantize"
    yield from found.items()


class StandIn(nn.Module):
    """Takes the place of a scripted or quantized part in a copy on meta."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        # The part is not a child, so that nothing looks into it or moves it to meta.
        vars(self)["part"] = copy.deepcopy(part).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with without_torch_functions(), torch.no_grad(), torch.device("cpu"):
            args, kwargs = pytree.tree_map_only(Tensor, _with_values, (args, kwargs))
            output = vars(self)["part"](*args, **kwargs)
            return pytree.tree_map_only(Tensor, _on_meta, output)


def _with_values(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor


def _on_meta(tensor: Tensor) -> Tensor:
    # Meta tensors know no scales, so a quantized tensor stays real until it is float again.
    return tensor if tensor.is_quantized else tensor.to("meta")
