"""Copies a model to meta tensors, to plan on the copy, or copies a block with its values."""

import copy
import functools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ForwardError, first_line
from se_inject.graph.containers import FLAT, is_flat, tensors_in
from se_inject.graph.foreign import StandIn, is_quantized, is_scripted
from se_inject.graph.frames import place_of_error
from se_inject.graph.thread import raise_interruption


def meta_copy(model: nn.Module, *, hooks: bool = False) -> nn.Module:
    """A copy of the model in eval mode whose tensors are all on meta.

    Hooks of ``torch.nn.utils`` (weight norm, spectral norm) belong to the model and stay.

    Args:
        model: any module. It is not changed.
        hooks: whether the copy has the user's hooks too.

    Raises:
        ForwardError: the model cannot be copied.
    """
    return copy_with_twins(model, hooks=hooks)[0]


def copy_without_hooks(module: nn.Module) -> nn.Module | None:
    """A copy with its values and without the user's hooks, or None if it cannot be copied."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for hooks in hooks_of(part):
            memo[id(hooks)] = _library_hooks(hooks)
    try:
        copied = copy.deepcopy(module, memo)
    except Exception as error:  # a foreign __deepcopy__ may raise anything
        raise_interruption(error)
        return None
    return None if _copied_oddly(module, copied, memo) else copied


def copy_with_twins(
    model: nn.Module, *, hooks: bool = False
) -> tuple[nn.Module, dict[int, nn.Module], dict[int, Tensor]]:
    """The copy, and two dicts from the ids of the model's modules and tensors to their copies."""
    memo: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}
    plain: list[nn.Module] = []  # those that copy.deepcopy copies attribute by attribute
    modules = list(model.modules())
    for module in modules:
        if is_scripted(module) or is_quantized(module):
            memo[id(module)] = StandIn(module)
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in tensors:
                memo[id(tensor)] = tensors[id(tensor)] = _to_meta(tensor)
        # The tensors in these dicts have been copied above.
        seen = {id(module._parameters), id(module._buffers), id(module._modules)}
        for name, value in vars(module).items():
            if id(value) in seen or is_flat(value):
                continue
            if _holds_hooks(name, value):
                if not hooks:
                    memo[id(value)] = _library_hooks(value)
            elif isinstance(value, torch.jit.ScriptFunction):
                memo[id(value)] = value  # torch cannot copy such a function
            elif isinstance(value, _HOLDERS):
                for tensor in tensors_in(value):  # detectors keep anchors in a plain list
                    if id(tensor) not in memo:
                        memo[id(tensor)] = tensors[id(tensor)] = _to_meta(tensor)
        kind: Any = type(module)
        if _copies_plainly(kind):
            plain.append(module)
    own = dict(memo)
    odd: list[nn.Module] = []
    try:
        for module in plain:
            memo[id(module)] = type(module).__new__(type(module))
        for module in reversed(plain):  # a foreign __deepcopy__ gets children that are complete
            _copy_attributes(module, memo)
        twin = copy.deepcopy(model, memo)
        while more := _copied_oddly(model, twin, memo):
            # The __deepcopy__ of these modules returns something else than a copy. They are copied
            # here like any other module.
            odd += [module for module in more if all(module is not known for known in odd)]
            memo.clear()
            memo |= own | {id(module): type(module).__new__(type(module)) for module in odd}
            for module in odd:
                vars(memo[id(module)]).update(
                    {k: copy.deepcopy(v, memo) for k, v in vars(module).items()}
                )
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # a foreign __deepcopy__ may raise anything
        raise_interruption(error)
        raise ForwardError(
            f"copy.deepcopy of the model fails ({type(error).__name__}: {first_line(error)});"
            " se_inject plans on a copy. Remove what cannot be copied from the modules first."
        ) from error
    twins = {id(m): memo[id(m)] for m in modules if isinstance(memo.get(id(m)), nn.Module)}
    try:
        twin.eval()  # its result is not used, because a user's train() may return None
    except Exception as error:  # a foreign train() or __setattr__ may raise anything
        raise_interruption(error)
        raise ForwardError(
            f"eval() of a copy of the model fails ({type(error).__name__}: {first_line(error)}"
            f"{place_of_error(error)}); se_inject plans in eval mode. Let the modules take it."
        ) from error
    return twin, twins, tensors


_HOLDERS = (Tensor, list, tuple, dict)

# The __setstate__ of a convolution only fills in what the files of an old torch lack.
_COPIED_PLAINLY = frozenset((nn.Module, object, nn.modules.conv._ConvNd))

# If a class defines one of these, copies of its instances may be made in another way.
_COPYING = {"__deepcopy__", "__reduce_ex__", "__reduce__", "__getstate__", "__setstate__"}
_COPYING |= {"__new__", "__getnewargs__", "__getnewargs_ex__", "__getattribute__", "__slots__"}


@functools.cache
def _copies_plainly(kind: Any) -> bool:
    """Whether ``copy.deepcopy`` makes a new object of the class and copies all its attributes."""
    if type(kind) is not type:
        return False
    own = (base for base in kind.__mro__ if base not in _COPIED_PLAINLY)
    return not any(name in vars(base) for base in own for name in _COPYING)


def _copy_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    """Fill the copy of a module. ``copy.deepcopy`` would do the same, but slower."""
    copied = vars(memo[id(module)])
    for name, value in vars(module).items():
        if type(value) in FLAT:
            copied[name] = value
        elif id(value) in memo:
            copied[name] = memo[id(value)]
        elif type(value) is set and not value:  # the names of buffers that are not saved
            memo[id(value)] = copied[name] = set()
        elif type(value) is OrderedDict and not value:  # of hooks
            memo[id(value)] = copied[name] = OrderedDict()
        elif type(value) is dict:
            memo[id(value)] = copied[name] = items = {}
            for key, item in value.items():
                known = item is None or id(item) in memo
                items[key] = memo.get(id(item)) if known else copy.deepcopy(item, memo)
        else:
            copied[name] = copy.deepcopy(value, memo)


def _copied_oddly(model: nn.Module, twin: Any, memo: Mapping[int, Any]) -> list[nn.Module]:
    """The modules whose copy is the module itself, or is not of the same class."""
    of_model = {id(m): m for m in model.modules()}
    kept = [m for m in twin.modules() if id(m) in of_model] if isinstance(twin, nn.Module) else []
    return kept + [
        module
        for key, module in of_model.items()
        if key in memo
        and type(memo[key]) is not type(module)
        # Each GraphModule has a class of its own.
        and not isinstance(memo[key], StandIn | torch.fx.GraphModule)
    ]


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The dicts in which a module keeps its hooks."""
    return [value for name, value in vars(module).items() if _holds_hooks(name, value)]


def _holds_hooks(name: str, value: Any) -> bool:
    return isinstance(value, dict) and "_hooks" in str(name)


def _to_meta(tensor: Tensor) -> Tensor:
    if type(tensor) in (Tensor, nn.Parameter) and _is_dense(tensor):
        shape, strides = tensor.shape, tensor.stride()
        meta = torch.empty_strided(shape, strides, dtype=tensor.dtype, device="meta")
    else:  # this takes longer, because torch does it in Python on meta
        meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and tensor.is_contiguous()


def _library_hooks(hooks: dict[int, Any]) -> OrderedDict[int, Any]:
    if not hooks:
        return OrderedDict()
    return OrderedDict(
        (key, hook)
        for key, hook in hooks.items()
        if type(hook).__module__.startswith("torch.nn.utils")
    )
