"""``import se_inject.timm`` puts models of timm with SE blocks into timm's own registry.

Each model ``NAME`` of timm gets a twin ``se_inject_NAME``. The twin builds the model and calls
``inject_se`` with those of its arguments that ``inject_se`` knows::

    import se_inject.timm
    model = timm.create_model("se_inject_resnet50.a1_in1k", pretrained=True, r=8)

Everything that builds models of timm by name can then build injected ones: timm's own scripts,
transformers' TimmWrapper, ``local-dir:`` and ``hf-hub:``. If a script does not import this module,
it can be run through it::

    python -m se_inject.timm train.py DATA --model se_inject_resnet50 --model-kwargs r=8
"""

import importlib
import runpy
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from torch import nn

from se_inject.api import inject_se
from se_inject.errors import ArgumentError
from se_inject.keep.beside import described, repeat
from se_inject.layers.attention import Attention
from se_inject.names import REGISTERED, base_architecture
from se_inject.plan.injection import Injection

__all__: list[str] = []  # timm's register_model puts the names of the models here

# timm's register_model looks here for the pretrained weights of a name.
default_cfgs: dict[str, Any] = {}

_OPTIONS = tuple(field.name for field in fields(Injection))
_PLAN = "se_inject"  # the argument of a model that holds what was injected, to repeat it


def register(names: Iterable[str] | None = None) -> None:
    """Register the injected twins of these models of timm. By default, these are all its models.

    Importing this module does so. Call it for models that you registered with timm afterwards.
    """
    import timm
    from timm.models import register_model

    for base in timm.list_models() if names is None else names:
        name = f"{REGISTERED}{base}"
        if base_architecture(base) != base or timm.is_model(name):
            continue
        build = _entry_point(name, base)
        default_cfgs[name] = _pretrained_weights(base)
        setattr(sys.modules[__name__], name, build)
        register_model(build)


def hf_config(model: nn.Module) -> dict[str, Any]:
    """What timm's ``save_for_hf`` and ``push_to_hf_hub`` have to know about an injected model.

    It is for models on which you called ``inject_se``. ``local-dir:`` and ``hf-hub:`` then build
    the same blocks again, wherever ``se_inject.timm`` is imported::

        timm.models.save_for_hf(model, "folder", **se_inject.timm.hf_config(model))

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: timm did not build the model.
    """
    plan = described(model)
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not architecture:
        raise ArgumentError(f"{type(model).__name__} is not from timm: save_se keeps it.")
    name = f"{REGISTERED}{base_architecture(architecture)}"
    return {"model_config": {"architecture": name}, "model_args": {_PLAN: plan}}


def _entry_point(name: str, base: str) -> Callable[..., nn.Module]:
    """The function that timm calls to build the injected model."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build(name, base, pretrained, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    build.__doc__ = f"timm's ``{base}`` with SE blocks. It takes the options of ``inject_se`` too."
    return build


def _build(name: str, base: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    import timm
    import torch
    from timm.models import load_pretrained

    own = {option: kwargs.pop(option) for option in _OPTIONS if option in kwargs}
    plan = kwargs.pop(_PLAN, None)
    if plan is not None and (given := [option for option in own if option != "attention"]):
        raise ArgumentError(
            f"the saved model says itself what was injected: leave out {', '.join(given)}."
        )
    # Weights that timm's save_for_hf kept of an injected model include its SE blocks, which are
    # therefore inserted before the weights are loaded. All others belong to the base and are loaded
    # into the base.
    with_blocks = pretrained and _source(kwargs.get("pretrained_cfg")) in ("local-dir", "hf-hub")
    if with_blocks and kwargs.get("features_only"):
        raise ArgumentError(
            f"features_only takes no saved weights of {name}: build the whole network, and call"
            " timm.models.FeatureGetterNet on it."
        )
    build = timm.model_entrypoint(base)
    model: Any = build(pretrained=pretrained and not with_blocks, **kwargs)
    size, channels = kwargs.get("img_size"), kwargs.get("in_chans", 3)
    # The configuration of the model has the image size of the pretrained weights, not this one.
    if size is not None and plan is None:
        sides = (size, size) if isinstance(size, int) else tuple(size)
        own["example_input"] = torch.empty(2, channels, *sides, device="meta")
    attention = own.pop("attention", None)
    se_layer = Attention(attention) if isinstance(attention, str) else attention
    if plan is None:
        inject_se(model, se_layer=se_layer, **own)
    else:
        repeat(model, plan, f"{name}: {_PLAN}", se_layer)
    if with_blocks:
        load_pretrained(
            model,
            pretrained_cfg=model.pretrained_cfg,
            num_classes=model.num_classes,
            in_chans=channels,
            cache_dir=kwargs.get("cache_dir"),
        )
    # timm's save_for_hf writes this down, so that local-dir: and hf-hub: build the same again.
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "architecture": name}
    return cast(nn.Module, model)


def _source(weights: Any) -> str | None:
    """Where timm takes pretrained weights from, according to their configuration."""
    if isinstance(weights, Mapping):
        return weights.get("source")
    return getattr(weights, "source", None)


def _pretrained_weights(base: str) -> Any:
    """The pretrained weights of a base by tag, the default ones first."""
    from timm.models import DefaultCfg, get_arch_pretrained_cfgs

    found = {
        name.partition(".")[2]: weights for name, weights in get_arch_pretrained_cfgs(base).items()
    }
    return DefaultCfg(
        tags=deque(found),
        cfgs=found,
        is_pretrained=any(weights.has_weights for weights in found.values()),
    )


def _main() -> None:
    """Run one of timm's scripts with the injected models in timm's registry."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m se_inject.timm SCRIPT.py [arguments of the script]")
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f"there is no script {script}; timm's are in its repository, not in the package.")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)  # as `python SCRIPT.py` has it
    # This file is __main__ now and not se_inject.timm, and only importing that registers the names.
    importlib.import_module("se_inject.timm")
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    _main()
else:
    register()
