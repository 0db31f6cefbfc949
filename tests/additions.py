"""Which additions of two maps a forward really runs, from the aten operations themselves.

An independent witness for the site lists: nothing here knows of torch.fx or of the rules of
``se_inject.sites``. The model runs on meta tensors under a ``TorchDispatchMode``; hooks keep the
stack of modules, so that each addition is known by the innermost module whose forward ran it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass
class Frame:
    """One call of a module: the maps that its own forward added, and whether a gate ran in it."""

    block: str
    kind: str  # "timm.models.resnet.Bottleneck"
    added: list[tuple[int, ...]] = field(default_factory=list)
    gated: bool = False  # a map was multiplied by one number a channel, here or in a child


class _Additions(TorchDispatchMode):
    def __init__(self, model: nn.Module, inputs: Iterable[Any]) -> None:
        super().__init__()
        self.frames: list[Frame] = []
        self.stack: list[Frame] = []
        # Computed from the inputs; held, so that no id is used twice.
        self.live: dict[int, Tensor] = {id(t): t for t in inputs if isinstance(t, Tensor)}
        self.hooks = []
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(self._enter(name)))
            self.hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            cls = type(module)
            self.stack.append(Frame(name, f"{cls.__module__}.{cls.__qualname__}"))
            self.frames.append(self.stack[-1])

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(id(leaf) in self.live for leaf in leaves):
            self.live.update((id(t), t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        packet = func.overloadpacket
        if len(args) >= 2 and all(id(a) in self.live for a in args[:2]) and self.stack:
            a, b = args[:2]
            if packet in (aten.add, aten.add_) and a.shape == b.shape and a.dim() in (4, 5):
                self.stack[-1].added.append(tuple(a.shape))
            if packet in (aten.mul, aten.mul_) and (_gates(a, b) or _gates(b, a)):
                for frame in self.stack:
                    frame.gated = True
        return out


def _gates(x: Tensor, gate: Tensor) -> bool:
    """Whether ``gate`` is one number a channel for all positions of ``x``: ``[..., C, 1, 1]`` or
    ``[..., 1, 1, C]``, perhaps expanded to the shape of ``x``.
    """
    if x.dim() not in (4, 5) or gate.dim() != x.dim():
        return False
    sizes = [1 if stride == 0 else n for n, stride in zip(gate.shape, gate.stride(), strict=True)]
    if sizes == list(x.shape):
        return False
    first = all(s == 1 for s in sizes[-2:]) and sizes[1:-2] == list(x.shape[1:-2])
    last = all(s == 1 for s in sizes[1:-1]) and sizes[-1] == x.shape[-1]
    return (first or last) and max(sizes[1:]) > 1


def additions(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Frame]:
    """The module calls that added maps, in one forward of a model that is on meta.

    A detector that stops for want of values (meta tensors have none) shows what ran until then.
    """
    log = _Additions(model, pytree.tree_leaves((args, kwargs)))
    try:
        with torch.no_grad(), torch.device("meta"), log:
            model(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
    finally:
        for hook in log.hooks:
            hook.remove()
    return [frame for frame in log.frames if frame.added]
