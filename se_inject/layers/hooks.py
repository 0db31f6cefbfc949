"""Whether anybody watches what a module returns: a hook of torch, or a tracer of torch.fx."""

from typing import Any

from torch import fx, nn
from torch.nn.modules import module as torch_module


def is_watched(module: nn.Module, x: Any) -> bool:
    """Whether a call of ``module`` with ``x`` is seen by anybody but its caller.

    Hooks on the module itself count, and so do hooks on all modules. A tracer of torch.fx counts
    too, because tools such as torchvision's ``create_feature_extractor`` name the nodes of a graph
    by the module that made them.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or isinstance(x, fx.Proxy)
    )
