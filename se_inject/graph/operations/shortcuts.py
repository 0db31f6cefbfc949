"""Makes the output of some torch functions on meta tensors faster than torch itself does.

Many functions have no kernel of their own for meta tensors. For these, torch runs a decomposition
in Python, which takes up to three milliseconds (attention) and most of the time of a forward. The
output of most functions below is like their input, and that of a linear layer or of an attention
has a simple shape, so it is made directly.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from se_inject.torch_private import dispatch_modes_active, without_torch_functions

_NORMS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm)
# The place of the argument ``inplace``, or -1 if there is none.
_LIKE_INPUT: dict[Any, int] = dict.fromkeys(_NORMS, -1)
_LIKE_INPUT |= dict.fromkeys((F.relu, F.relu6, F.silu, F.mish, F.hardswish, F.hardsigmoid), 1)
_LIKE_INPUT |= {F.selu: 1, F.leaky_relu: 2, F.elu: 2, F.celu: 2, F.hardtanh: 3}
_LIKE_INPUT |= dict.fromkeys((F.gelu, F.softplus, F.logsigmoid, F.sigmoid, F.tanh), -1)
_LIKE_INPUT |= dict.fromkeys((torch.relu, torch.sigmoid, torch.tanh), -1)
_LIKE_INPUT |= dict.fromkeys((Tensor.relu, Tensor.sigmoid, Tensor.tanh), -1)
_OF_TWO = {torch.add, torch.mul, Tensor.add, Tensor.mul, Tensor.__add__, Tensor.__mul__}


def shortcut(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The output of a function on meta, or None if torch has to compute it."""
    place = _LIKE_INPUT.get(func)
    if place is None:
        if func in _PRODUCTS and not dispatch_modes_active():  # A FLOP counter sees the real ones.
            return _PRODUCTS[func](*args, **kwargs)
        return _sum_or_product(*args) if func in _OF_TWO and len(args) == 2 and not kwargs else None
    x = args[0] if args else kwargs.get("input")
    # Questions to a tensor in here must not count as functions of the forward.
    with without_torch_functions():
        if not isinstance(x, Tensor) or not (x.is_meta and x.is_floating_point()):
            return None
        in_place = kwargs.get("inplace", 0 < place < len(args) and args[place])
        return x.relu_() if in_place else x.clone()


def _sum_or_product(a: Any, b: Any) -> Tensor | None:
    """The sum or product of two maps of one shape, or of a map and its gate."""
    with without_torch_functions():
        if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_meta and b.is_meta):
            return None
        if a.dtype != b.dtype or a.dim() != b.dim() or not a.is_floating_point():
            return None
        if not all(n in (1, m) for m, n in zip(a.shape, b.shape, strict=True)):
            return None
        return a.clone() if a.stride() == b.stride() or a.is_contiguous() else None


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    with without_torch_functions():
        if not (_on_meta(input) and _on_meta(weight) and (bias is None or _on_meta(bias))):
            return None
        if weight.dim() != 2 or input.dim() < 2 or input.shape[-1] != weight.shape[1]:
            return None
        if input.dtype != weight.dtype or (bias is not None and bias.shape != weight.shape[:1]):
            return None
        made: Tensor = input.new_empty(*input.shape[:-1], weight.shape[0])
        return made


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Tensor | None:
    with without_torch_functions():
        if not (_on_meta(query) and _on_meta(key) and _on_meta(value)):
            return None
        q, k, v = query.shape, key.shape, value.shape
        if not (len(q) == len(k) == len(v) == 4 and q[:2] == k[:2] == v[:2]):
            return None
        if q[-1] != k[-1] or k[-2] != v[-2] or not query.dtype == key.dtype == value.dtype:
            return None
        made: Tensor = query.new_empty(*q[:-1], v[-1])
        return made


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point()


_PRODUCTS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}
