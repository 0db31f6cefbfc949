"""Refuses arguments and models that cannot work, before anything else is done."""

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from torch import nn

from se_inject.errors import ArgumentError, SEInjectError, UnsupportedModelError, first_line
from se_inject.graph.foreign import is_quantized, is_scripted
from se_inject.graph.frames import place_of_error
from se_inject.graph.thread import raise_interruption
from se_inject.layers.variant import check_known
from se_inject.names import block_label
from se_inject.plan.injection import Injection
from se_inject.sites.placements import PLACEMENTS
from se_inject.sites.scaled import Where


def check_injection(injection: Injection) -> None:
    """Raise an :class:`ArgumentError` for a value that cannot work."""
    r, variant, se_layer = injection.r, injection.variant, injection.se_layer
    if isinstance(r, Mapping) and not r:
        raise ArgumentError("r={} gives no number for any block. Write {'*': 16}.")
    for value in r.values() if isinstance(r, Mapping) else [r]:
        _check_positive_int("r", value, "the reduction ratio C / rd, such as 16")
    divisor_means = "8 as in timm, or 1 for the paper's plain C/r"
    _check_positive_int("divisor", variant.divisor, divisor_means)
    check_known("where", injection.where, get_args(Where))
    check_known("placement", variant.placement, tuple(PLACEMENTS))
    if injection.where == "units" and variant.placement != "standard":
        raise ArgumentError(
            f"placement={variant.placement!r} needs residual additions, and units have none."
            " Leave it out, or pass where='residual'."
        )
    variant.check()
    if se_layer is None:
        return
    if not callable(se_layer):
        raise ArgumentError(
            f"se_layer={se_layer!r} is not callable. Pass a function: channels -> nn.Module."
        )
    own = [f"{k}={v!r}" for k, v in variant.differing().items() if k != "placement"]
    if own:
        raise ArgumentError(
            f"{', '.join(own)} belongs to the SE block, which se_layer replaces. Leave it out, or"
            " build the layer that way."
        )


def _check_positive_int(name: str, value: Any, meaning: str) -> None:
    try:
        valid = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise ArgumentError(f"{name}={value!r} is not a positive whole number: {meaning}.")


def check_model(model: Any) -> None:
    """Raise an :class:`UnsupportedModelError` for a model that cannot be edited as it is."""
    if not issubclass(type(model), nn.Module):
        raise UnsupportedModelError(f"expected an nn.Module, got {type(model).__name__}.")
    if is_scripted(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is TorchScript. Inject into the Python model."
        )
    if is_quantized(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized. Inject into the float model, then quantize."
        )
    try:
        named = list(model.named_modules())
    except TypeError as error:  # a module cannot be hashed, which torch itself has to do
        raise UnsupportedModelError(
            f"the modules of {type(model).__name__} cannot be listed ({first_line(error)})."
        ) from error
    for name, module in named:
        if is_scripted(module):
            continue
        kind = type(module).__name__
        label = f"{block_label(name)} ({kind})"
        if kind == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedModelError(
                f"{label} is compiled. Inject first, then torch.compile the result"
                " (the model inside is `model._orig_mod`)."
            )
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise UnsupportedModelError(
                f"{label} is a wrapper for parallel runs. Inject into the model inside it"
                " (`model.module`) and wrap that."
            )
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            raise UnsupportedModelError(f"{label} is sharded already. Inject before fully_shard.")
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{label} has uninitialised lazy parameters. Run one forward first."
            )


@contextlib.contextmanager
def refusing_faults_of_the_model() -> Iterator[None]:
    """Turn an error that the model's own Python raises into an :class:`UnsupportedModelError`.

    A class may raise an error when it is asked for what every module has (``modules()``,
    ``parameters()``, ``__class__``, attributes). If no file of the model raised the error, it is a
    fault of se_inject and is passed on.
    """
    try:
        yield
    except SEInjectError:
        raise
    except Exception as error:
        raise_interruption(error)
        place = place_of_error(error)
        if not place:
            raise
        raise UnsupportedModelError(
            f"the model cannot be planned: its own code fails{place} when it is asked what every"
            f" module is asked ({type(error).__name__}: {first_line(error)})."
        ) from error
