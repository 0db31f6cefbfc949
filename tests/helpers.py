"""Helpers of the tests: nothing here comes from se_inject."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Give every norm, bias, layer scale and gain a value that shows a mistake.

    Fresh networks hide mistakes: zero-initialised last norms make every branch vanish, and unit
    statistics make a dropped norm invisible. Scales stay under 1, or a deep network amplifies
    the last bit of a rounding into another answer.
    """
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(0, 0.1)
        elif p.dim() <= 1 or "gamma" in name or "layer_scale" in name or "gain" in name:
            p.uniform_(0.25, 0.75)
    return model


@torch.no_grad()
def open_gates(model: nn.Module) -> None:
    """Make every gate of an injected model depend on its input (tests that nothing is idle)."""
    for name, p in model.named_parameters():
        if ".se" in name or name.startswith("se"):
            p.normal_(0, 0.5)


def first_tensor(output: object) -> torch.Tensor:
    """The main output of a model: detection and segmentation models return dicts."""
    if isinstance(output, dict):
        return output["out"]
    assert isinstance(output, torch.Tensor)
    return output
