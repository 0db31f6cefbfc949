"""Makes the output of some torch functions on meta tensors faster than torch itself does.

Many functions have no kernel of their own for meta tensors. For these, torch runs a decomposition
in Python, which takes up to six milliseconds (resizing) and most of the time of a forward. But a
network calls the same functions on the same shapes again and again. So the shape of an output is
remembered, and the next such output is made directly.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from se_inject.graph.containers import tensors_in
from se_inject.torch_private import (
    dispatch_modes_active,
    forward_derivatives_active,
    function_modes,
    storage_id,
    transforms_active,
    without_torch_functions,
)

_NORMS = (F.batch_norm, F.group_norm, F.instance_norm, F.layer_norm, F.rms_norm)
# The functions whose output is like their input, with the place of the argument ``inplace``, or -1
# if there is none.
_LIKE_INPUT: dict[Any, int] = dict.fromkeys(_NORMS, -1)
_LIKE_INPUT |= dict.fromkeys((F.relu, F.relu6, F.silu, F.mish, F.hardswish, F.hardsigmoid), 1)
_LIKE_INPUT |= {F.selu: 1, F.leaky_relu: 2, F.elu: 2, F.celu: 2, F.hardtanh: 3}
_LIKE_INPUT |= dict.fromkeys((F.gelu, F.softplus, F.logsigmoid, F.sigmoid, F.tanh), -1)
_LIKE_INPUT |= dict.fromkeys((torch.relu, torch.sigmoid, torch.tanh), -1)
_LIKE_INPUT |= dict.fromkeys((Tensor.relu, Tensor.sigmoid, Tensor.tanh), -1)

# Functions whose outputs are new tensors. Their shapes depend on the shapes, strides and dtypes of
# the tensors that the functions are given, and on the other arguments.
_NAMES = """
    add sub mul div __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__
    pow square sqrt rsqrt exp log neg abs clamp maximum minimum mean sum var std amax amin softmax
    cat concat stack roll matmul __matmul__ bmm einsum linear scaled_dot_product_attention
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    interpolate upsample grid_sample pad normalize pixel_shuffle pixel_unshuffle fold unfold
    lstm gru rnn_tanh rnn_relu
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
"""
_REPEATED = {
    getattr(space, name)
    for name in _NAMES.split()
    for space in (torch, Tensor, F)
    if hasattr(space, name)
}

_REMEMBERED: dict[Hashable, Any] = {}  # what _key() says of the outputs, by that of the arguments
_MOST = 20_000  # entries, of about 2 kB each

_PLAIN = frozenset((bool, int, float, str, type(None)))
_PLAIN |= {torch.dtype, torch.device, torch.memory_format}


def run_on_meta(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a function on meta tensors, or make the output that it would return."""
    if torch.compiler.is_compiling():  # Dynamo would read all of this, and put it into its graph
        return func(*args, **kwargs)
    # Questions to a tensor in here must not count as functions of the forward.
    if func in _LIKE_INPUT:
        with without_torch_functions():
            made = _like_input(_LIKE_INPUT[func], args, kwargs)
        return func(*args, **kwargs) if made is None else made
    if func not in _REPEATED or _somebody_looks():
        return func(*args, **kwargs)
    with without_torch_functions():
        given = _key((args, kwargs, torch.get_default_dtype()))
        key = (func, given)
        if (made := _REMEMBERED.get(key)) is not None:
            return _made_again(made)
    out = func(*args, **kwargs)
    with without_torch_functions():
        if given is not None and _is_new(out, tensors_in((args, kwargs))):
            if len(_REMEMBERED) >= _MOST:
                _REMEMBERED.clear()
            _REMEMBERED[key] = _key(out)
    return out


def _like_input(place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    x = args[0] if args else kwargs.get("input")
    if not isinstance(x, Tensor) or not (x.is_meta and x.is_floating_point()):
        return None
    in_place = kwargs.get("inplace", 0 < place < len(args) and args[place])
    return x.relu_() if in_place else x.clone()


def _somebody_looks() -> bool:
    """Whether more than the outputs counts, or others may change them.

    That is so if there are modes of the user's (a FLOP counter) or derivatives, and under vmap.
    """
    return bool(
        torch.is_grad_enabled()
        or function_modes()
        or dispatch_modes_active()
        or transforms_active()
        or forward_derivatives_active()
    )


def _key(value: Any) -> Hashable:
    """All that the shape of an output depends on, or None if that is not known."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # with the type, because 1 == 1.0 == True
    if kind is tuple or kind is list or kind is torch.Size:
        parts = [_key(part) for part in value]
        return None if None in parts else (kind, *parts)
    if kind is dict:
        parts = [_key(item) for item in value.values()]
        return None if None in parts else (*value, *parts)
    return (tuple(value.shape), value.stride(), value.dtype) if _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    """Whether shape, strides and dtype are all that there is to know about a meta tensor."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.is_meta
        and value.layout is torch.strided
        and not (value.is_quantized or value.is_complex())
    )


def _is_new(out: Any, given: list[Tensor]) -> bool:
    """Whether a function returns plain tensors that share no memory with others."""
    outputs = out if type(out) is tuple else (out,)
    if not all(map(_is_plain, outputs)):
        return False
    made = {storage_id(tensor) for tensor in outputs}
    return len(made) == len(outputs) and made.isdisjoint(map(storage_id, given))


def _made_again(made: Any) -> Any:
    """New outputs with the shapes, strides and dtypes that :func:`_key` has found."""
    if made[0] is tuple:
        return tuple(map(_made_again, made[1:]))
    shape, strides, dtype = made
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
