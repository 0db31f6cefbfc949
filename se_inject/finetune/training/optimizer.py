"""timm's optimizers and schedules for a recipe: which parameters learn at which rate, and when."""

from collections.abc import Callable, Iterator
from typing import Any

import timm.optim
import torch
from timm.scheduler import create_scheduler_v2
from torch import nn

from se_inject.errors import ArgumentError, first_line
from se_inject.finetune.options.settings import Settings
from se_inject.names import near_names


def optimizer_of(
    network: nn.Module, new: frozenset[str], settings: Settings, steps: int
) -> dict[str, Any]:
    """Make the optimizer and the schedule, in the form that Lightning takes.

    Args:
        new: the names of the parameters that learn at the full rate. All others are the base's.
        steps: the number of steps of the whole run.

    Raises:
        ArgumentError: timm has no such optimizer, or it cannot be made for these parameters.
    """
    known = timm.optim.list_optimizers()
    if settings.opt not in known:
        raise ArgumentError(
            f"--opt {settings.opt} is not an optimizer of timm. Near names:"
            f" {near_names(settings.opt, known)}, ..."
        )
    groups = list(groups_of(network, new, settings))
    try:
        optimizer = timm.optim.create_optimizer_v2(groups, opt=settings.opt, lr=settings.lr)
    except Exception as error:  # a package may be missing, or an argument of the optimizer
        raise ArgumentError(
            f"--opt {settings.opt} cannot be used here ({first_line(error)}). The default is adamw."
        ) from error
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_of(settings, steps))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def groups_of(
    network: nn.Module, new: frozenset[str], settings: Settings
) -> Iterator[dict[str, Any]]:
    """The groups of parameters that learn with the same rate and the same weight decay.

    The base learns at a smaller rate, and --layer-decay makes the rate of its early layers smaller
    still. Biases and norms have no weight decay.
    """
    scales = _layer_scales(network, settings)
    groups: dict[tuple[bool, bool, float], list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            is_new = name in new
            decays = p.dim() > 1 and not name.endswith("bias")
            scale = 1.0 if is_new else scales.get(id(p), 1.0)
            groups.setdefault((is_new, decays, scale), []).append(p)
    for (is_new, decays, scale), parameters in sorted(groups.items(), key=lambda item: item[0]):
        yield {
            "params": parameters,
            "lr": settings.lr * (1.0 if is_new else settings.base_lr_scale * scale),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }


def _layer_scales(network: nn.Module, settings: Settings) -> dict[int, float]:
    """The factor by which timm's layer decay multiplies the rate of each parameter."""
    if settings.layer_decay is None:
        return {}
    groups = timm.optim.param_groups_layer_decay(network, layer_decay=settings.layer_decay)
    return {id(p): float(group["lr_scale"]) for group in groups for p in group["params"]}


def factor_of(settings: Settings, steps: int) -> Callable[[int], float]:
    """The factor that multiplies all rates in a step. It rises linearly, then follows timm."""
    rise = max(1, steps // 20)
    if settings.lr_warmup is not None:
        rise = round(settings.lr_warmup * steps / settings.epochs)
    rest = max(1, steps - rise)
    # timm's schedules set the rate of an optimizer. If that rate is 1, they set it to the factor.
    one = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, _ = create_scheduler_v2(
        one,
        settings.sched,
        num_epochs=rest,
        decay_epochs=max(1, -(-rest // 3)),  # used by step
        decay_rate=1.0 if settings.sched == "poly" else 0.1,  # poly takes it as its power
    )

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        if schedule is None:
            return 1.0
        schedule.step(min(step - rise, rest))
        return float(one.param_groups[0]["lr"])

    return factor
