"""The classifier of a network, whatever library the network comes from."""

from typing import Any

from torch import nn


def head_of(network: nn.Module) -> nn.Module | None:
    """The classifier that timm names, or else the last Linear layer, or None without either."""
    head = _of_timm(network)
    if isinstance(head, nn.Module) and any(True for _ in head.parameters()):
        return head
    return next((m for m in reversed([*network.modules()]) if isinstance(m, nn.Linear)), None)


def num_classes_of(network: nn.Module) -> int | None:
    """The number of outputs of the network's present classifier, which users may have replaced.

    If the classifier does not say, the ``num_classes`` of the network counts. None means that
    neither of the two says.
    """
    head = _of_timm(network) if hasattr(network, "get_classifier") else head_of(network)
    width = getattr(head, "out_features", None)
    return int(width) if width is not None else getattr(network, "num_classes", None)


def head_name(network: nn.Module) -> str | None:
    """The name of a timm network's classifier among its modules, or None for other networks."""
    head = _of_timm(network)
    return next((name for name, m in network.named_modules() if m is head), None)


def _of_timm(network: nn.Module) -> Any:
    find: Any = getattr(network, "get_classifier", None)
    return None if find is None else find()
