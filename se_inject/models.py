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
from torch.overrides import TorchFunctionMode

from se_inject.errors import ArgumentError, UnknownModelError


def load_model(name: str, *, in_chans: int | None = None, meta: bool = False) -> nn.Module:
    """Build a model by name, with random weights.

    Args:
        name: a timm name (``resnet50``, ``resnet50.a1_in1k``, ``hf-hub:timm/resnet50.a1_in1k``),
            ``torchvision/NAME``, or ``module:callable``, imported from the current directory
            too and called without arguments. A bare name that timm does not know is looked for
            in torchvision.
        in_chans: input channels, for timm models.
        meta: build on the meta device, without memory or random numbers.

    Raises:
        UnknownModelError: nothing has that name (near names are shown), or it cannot be built.
        ArgumentError: ``in_chans`` for a model that cannot take it.
    """
    if meta:
        try:
            with ParametersOnMeta():
                model = load_model(name, in_chans=in_chans)
            return model.to("meta")
        except UnknownModelError as error:
            if not isinstance(error.__cause__, RuntimeError):
                raise
        # timm's hybrids run their backbone on a tensor of zeros, which has to be on meta too.
        with torch.device("meta"):
            return load_model(name, in_chans=in_chans)
    if ":" in name and not name.startswith(("hf-hub:", "local-dir:")):
        return _from_callable(name, in_chans)
    if name.startswith("torchvision/"):
        return _from_torchvision(name.removeprefix("torchvision/"), in_chans)
    import timm

    if name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name):
        return _build(name, timm.create_model, name, pretrained=False, in_chans=in_chans)
    return _from_torchvision(name, in_chans, also=timm.list_models())


class ParametersOnMeta(TorchFunctionMode):
    """Allocate on meta what layers allocate for their parameters (``torch.empty``).

    ``torch.device("meta")`` would do so for every tensor, and builders that compute on tensors
    (torchvision's RegNets their widths) would fail.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def default_input_size(name: str, model: nn.Module) -> tuple[int, ...] | None:
    """[C, H, W] (video: [C, T, H, W]) that a library model was trained on; None for others."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and "input_size" in config:
        return tuple(config["input_size"])
    if type(model).__module__.startswith("torchvision."):
        from torchvision.models import get_model_weights, list_models, video

        name = name.removeprefix("torchvision/")
        for weights in get_model_weights(name) if name in list_models() else ():
            if crop := getattr(weights.transforms(), "crop_size", None):
                clip = (16,) if name in list_models(module=video) else ()
                return (3, *clip, crop[0], crop[-1])
    return None


def _from_torchvision(name: str, in_chans: int | None, also: Iterable[str] = ()) -> nn.Module:
    from torchvision.models import get_model, list_models

    known = list_models()
    if name not in known:
        near = difflib.get_close_matches(name, {*also, *known}, n=4, cutoff=0.5)
        hint = f"Near names: {', '.join(near)}." if near else "See timm.list_models()."
        raise UnknownModelError(f"no model {name!r} in timm or torchvision. {hint}")
    if in_chans not in (None, 3):
        raise ArgumentError(f"torchvision's {name} takes 3 input channels; --in-chans is for timm.")
    # Whatever the library would fetch by default (a detector's backbone) is not wanted here.
    backbone = {"weights_backbone": None} if _takes(name, "weights_backbone") else {}
    return _build(name, get_model, name, weights=None, **backbone)


def _takes(name: str, argument: str) -> bool:
    from torchvision.models import get_model_builder

    return argument in inspect.signature(get_model_builder(name)).parameters


def _from_callable(name: str, in_chans: int | None) -> nn.Module:
    module_name, _, attribute = name.partition(":")
    if in_chans is not None:
        raise ArgumentError(f"--in-chans is for timm models; let {name} build what it should.")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UnknownModelError(
            f"cannot import {module_name!r} for {name!r}: {error}. Write module:callable."
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
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UnknownModelError(
            f"building {name!r} failed: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnknownModelError(f"{name} returned {type(model).__name__}, not an nn.Module.")
    return model
