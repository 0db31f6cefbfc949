"""Fingerprints that tell one base network from another, by its tensors and its modules."""

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import edit_of

# The buffers of this name only count training steps. A base that has seen more batches is still the
# same base.
COUNTERS = "num_batches_tracked"


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the ``state_dict``, without those that a ``get_extra_state`` adds."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and not key.endswith("_extra_state")
    }


def se_keys(model: nn.Module, state: Iterable[str]) -> list[str]:
    """The keys of the state_dict that belong to SE blocks, under every name that a block has."""
    prefixes = tuple(
        f"{name}.{child}.".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if (edit := edit_of(module))
        for child in edit.children
    )
    return [key for key in state if key.startswith(prefixes)]


def module_hashes(model: nn.Module) -> dict[str, str]:
    """For each module of the base, a hash of its class and its repr (eps, stride, ...)."""
    ours = [
        id(module.get_submodule(child))
        for module in model.modules()
        if (edit := edit_of(module))
        for child in edit.children
    ]
    inside = {id(m) for module in model.modules() if id(module) in ours for m in module.modules()}
    said = {}
    for name, module in model.named_modules():
        if id(module) not in inside:
            edit = edit_of(module)
            kind = (edit.base if edit else type(module)).__qualname__
            text = f"{kind}({module.extra_repr()})"
            said[name] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return said


def fingerprint(key: str, tensor: Tensor, *, hashed: bool) -> list[Any]:
    """The dtype and shape of a tensor, and a hash of its values if that is wanted."""
    same = hashed and not key.endswith(COUNTERS)
    return [dtype_name(tensor), list(tensor.shape), hash_of(tensor) if same else None]


def dtype_name(tensor: Tensor) -> str:
    """The dtype without ``torch.``, as in ``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


def hash_of(tensor: Tensor) -> str:
    """A hash of the bytes of a tensor. Its 64 bits guard against mistakes, not against forgers."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]
