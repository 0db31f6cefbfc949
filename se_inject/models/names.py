""" "resnet50", "torchvision/resnet50", "my_pkg.nets:build" -> an ``nn.Module``."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from se_inject.errors import ArgumentError, UnknownModelError, first_line
from se_inject.names import REGISTERED

# The sources other than its own names that timm builds a model from.
_TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


def is_code(name: str) -> bool:
    """Whether the name of a model is a ``module:callable``, which is imported to build it."""
    return ":" in name and not name.startswith(_TIMM_SOURCES)


def load_model(
    name: str,
    *,
    in_chans: int | None = None,
    num_classes: int | None = None,
    pretrained: bool = False,
    drop_path: float | None = None,
    meta: bool = False,
) -> nn.Module:
    """Build a model by name, with random weights or with those that its library offers.

    Args:
        name: a timm name (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:timm/resnet50.a1_in1k``),
            ``torchvision/NAME``, or ``module:callable``. The module of a callable may also be in
            the current directory, and the callable is called without arguments. A bare name that
            timm does not know is looked for in torchvision.
        in_chans: the number of input channels, for timm models. A callable does not get it.
        num_classes: the number of outputs of the classifier, for models of timm and torchvision.
        pretrained: whether to load the weights of the tag, or the default weights of the library,
            which may be downloaded. A callable does not get it and loads what it wants.
        drop_path: the rate of stochastic depth at the last block, for timm models.
        meta: whether to build the model on the meta device, without memory or random numbers. The
            model of a callable is moved there after it is built.

    Raises:
        UnknownModelError: nothing has that name (similar names are shown), or the model cannot be
            built.
        ArgumentError: the model cannot take ``in_chans``, ``num_classes`` or ``drop_path``.
    """
    options: dict[str, Any] = {
        "in_chans": in_chans,
        "num_classes": num_classes,
        "pretrained": pretrained,
        "drop_path": drop_path,
    }
    if is_code(name):
        # A user's builder may load or read weights, which is impossible with meta tensors.
        if num_classes is not None:
            raise ArgumentError(
                f"{name} is your own code. --num-classes is for models of timm and torchvision."
            )
        if drop_path is not None:
            raise ArgumentError(f"{name} is your own code. --drop-path is for models of timm.")
        model = _from_callable(name)
        return model.to("meta") if meta else model
    if not meta:
        return _from_library(name, **options)
    try:
        with ParametersOnMeta():
            return _from_library(name, **options).to("meta")
    except UnknownModelError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
    # timm's hybrids run their backbone on a tensor of zeros, and that has to be on meta too.
    with torch.device("meta"):
        return _from_library(name, **options)


def timm_names() -> list[str]:
    """The models of timm, without the injected ones that ``se_inject.timm`` registers."""
    import timm

    return [name for name in timm.list_models() if not name.startswith(REGISTERED)]


def _from_library(
    name: str,
    *,
    in_chans: int | None,
    num_classes: int | None,
    pretrained: bool,
    drop_path: float | None,
) -> nn.Module:
    if name.startswith("torchvision/"):
        if drop_path is not None:
            raise ArgumentError(f"{name}: --drop-path is for models of timm.")
        name = name.removeprefix("torchvision/")
        return _from_torchvision(name, in_chans, num_classes, pretrained)
    import timm

    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": in_chans}
    if num_classes is not None:
        options["num_classes"] = num_classes
    if drop_path is not None:
        options["drop_path_rate"] = drop_path

    name = name.removeprefix("timm/")
    architecture, _, tag = name.partition(".")
    if name.startswith(_TIMM_SOURCES):
        return _build(name, timm.create_model, name, **options)
    if not timm.is_model(architecture):
        also = timm_names()
        return _from_torchvision(architecture, in_chans, num_classes, pretrained, also)
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        near = difflib.get_close_matches(tag, tags, n=4, cutoff=0) or ["(none)"]
        raise UnknownModelError(
            f"timm's {architecture} has no tag {tag!r}. Near tags: {', '.join(near)}."
        )
    try:
        return _build(name, timm.create_model, name, **options)
    except UnknownModelError as error:
        if drop_path is None or "drop_path_rate" not in str(error):
            raise
        raise ArgumentError(f"{name} has no stochastic depth: leave out --drop-path.") from error


# The in-place operations of initialisations. None of them changes the shape or dtype of a tensor.
_FILLS = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(torch.Tensor.uniform_, torch.Tensor.normal_, torch.Tensor.erfinv_, torch.Tensor.clamp_),
    *(torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.fill_, torch.Tensor.zero_),
}


class ParametersOnMeta(TorchFunctionMode):
    """Allocate the parameters of layers on meta, wherever layers call ``torch.empty``.

    ``torch.device("meta")`` would put every tensor there. Builders that compute with tensors would
    then fail, as torchvision's RegNets do with their widths. Filling a meta tensor is skipped,
    because PyTorch would check shapes in Python for each step of a truncated normal.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS:
            filled = args[0] if args else kwargs["tensor"]  # as torch.nn.init names it
            refused = is_lazy(filled) or (func is nn.init.kaiming_uniform_ and filled.dim() < 2)
            if filled.is_meta and not refused:
                return filled
        elif func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _from_torchvision(
    name: str,
    in_chans: int | None,
    num_classes: int | None,
    pretrained: bool,
    also: Iterable[str] = (),
) -> nn.Module:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name not in known:
        near = difflib.get_close_matches(name, {*also, *known}, n=4, cutoff=0.5)
        hint = f"Near names: {', '.join(near)}." if near else "See timm.list_models()."
        raise UnknownModelError(f"no model {name!r} in timm or torchvision. {hint}")
    if in_chans not in (None, 3):
        raise ArgumentError(
            f"torchvision's {name} takes 3 input channels. --in-chans is for models of timm."
        )
    # The library would fetch some weights by default, such as a detector's backbone. They are not
    # wanted here.
    options: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    if _takes(name, "weights_backbone"):
        options["weights_backbone"] = None
    if num_classes is not None:
        options["num_classes"] = num_classes
    return _build(name, get_model, name, **options)


def _takes(name: str, argument: str) -> bool:
    from torchvision.models import get_model_builder

    return argument in inspect.signature(get_model_builder(name)).parameters


def _from_callable(name: str) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # importing runs foreign code
        raise UnknownModelError(
            f"cannot import {module_name!r} for {name!r} ({type(error).__name__}:"
            f" {first_line(error)}). Write module:callable, such as my_pkg.nets:build."
        ) from error
    finally:
        sys.path.pop(0)
    build = getattr(module, attribute, None)
    if not callable(build):
        near = difflib.get_close_matches(attribute, dir(module), n=3)
        hint = f" Near names: {', '.join(near)}." if near else ""
        raise UnknownModelError(f"{module_name!r} has no callable {attribute!r}.{hint}")
    return _build(name, build)


def _build(name: str, builder: Callable[..., Any], *args: Any, **kwargs: Any) -> nn.Module:
    try:
        model = builder(*args, **kwargs)
    except Exception as error:  # a foreign builder may raise anything
        raise UnknownModelError(
            f"building {name!r} failed: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnknownModelError(f"{name} returned {type(model).__name__}, not an nn.Module.")
    return model
