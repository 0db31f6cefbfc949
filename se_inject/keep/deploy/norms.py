"""Batch norms -> the convolutions before them, where one forward shows that nothing else reads.

A norm in eval mode multiplies each channel by a constant and adds another. The convolution before
it can do both, if its output goes into that norm and nowhere else. Which operation reads which
tensor is seen while the network runs once.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from se_inject.graph.recording.call import Arguments
from se_inject.keep.fold import Producers
from se_inject.layers.hooks import is_watched
from se_inject.layers.layout import CONVOLUTIONS
from se_inject.torch_private import DispatchMode, pytree

# What tells Python of values: ``if x.mean() > 0``, ``torch.equal``, the number of boxes.
_TO_PYTHON = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
)


def run_once(model: nn.Module, given: Arguments) -> tuple[Any, list["Pair"]]:
    """What a model in eval mode gives back, and which of its norms could be folded.

    Only a convolution and a norm that are called once, that have no hooks, and whose weights
    nothing else has or reads are a pair; and the output of the convolution has to be read by one
    operation, be the input of the norm, and not be kept by anybody when the forward is over. What
    runs after the forward has looked at values may be another thing for other images.
    """
    reads = _Reads()
    alone = Producers(model)
    convolutions: dict[str, list[_Seen | None]] = {}
    norms: dict[str, list[_Seen | None]] = {}
    handles = []
    for name, module in model.named_modules():
        if is_touched(module) or not alone.has_alone(module):
            continue
        if type(module) in _convolutions():
            calls = convolutions[name] = []

            # Defaults bind what differs from module to module.
            def made(m: nn.Module, args: Any, out: Any, calls: list[_Seen | None] = calls) -> None:
                calls.append(None if reads.saw_values else reads.follow(out))

            handles.append(module.register_forward_hook(made))
        elif _is_constant_norm(module):
            inputs = norms[name] = []

            def read(m: nn.Module, args: Any, inputs: list[_Seen | None] = inputs) -> None:
                known = len(args) == 1 and not reads.saw_values
                inputs.append(reads.seen.get(id(args[0])) if known else None)

            handles.append(module.register_forward_pre_hook(read))
    modules = dict(model.named_modules())
    weights = {
        name: [reads.follow(t) for t in _tensors(modules[name])] for name in (*convolutions, *norms)
    }
    try:
        args, kwargs = given
        with reads:
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    makers = {id(calls[0]): name for name, calls in convolutions.items() if len(calls) == 1}
    makers.pop(id(None), None)
    pairs = []
    for norm, inputs in norms.items():
        seen = inputs[0] if len(inputs) == 1 else None
        convolution = makers.get(id(seen)) if seen is not None else None
        if seen is None or convolution is None or seen.reads != 1 or seen.tensor() is not None:
            continue
        own = [*weights[convolution], *weights[norm]]
        dtypes = {t.dtype for name in (convolution, norm) for t in _tensors(modules[name])}
        if all(weight.reads <= 1 for weight in own) and len(dtypes) == 1:
            pairs.append(Pair(convolution, norm))
    return output, pairs


@dataclass(frozen=True)
class Pair:
    """The names of a convolution and of the norm that alone reads what it computes."""

    convolution: str
    norm: str


def fold_norms(model: nn.Module, pairs: Sequence[Pair]) -> list[str]:
    """Fold these norms, in place; the names of those that were folded."""
    folded = []
    for pair in pairs:
        convolution: Any = model.get_submodule(pair.convolution)
        norm: Any = model.get_submodule(pair.norm)
        weight, bias = fuse_conv_bn_weights(
            convolution.weight,
            convolution.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            continue  # such as float16 weights of a channel that hardly varies
        convolution.weight, convolution.bias = weight, bias
        owner, _, child = pair.norm.rpartition(".")
        model.get_submodule(owner)._modules[child] = _what_is_left(norm)
        folded.append(pair.norm)
    return folded


def is_touched(module: nn.Module) -> bool:
    """Whether hooks watch a module, or something has put another forward on it."""
    return is_watched(module, None) or "forward" in vars(module)


@dataclass(eq=False)
class _Seen:
    """A tensor, and how many operations have read it."""

    tensor: weakref.ref[Tensor]
    reads: int = field(default=0)


class _Reads(DispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Counts the operations that read certain tensors, and keeps none of them alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.seen: dict[int, _Seen] = {}
        self.saw_values = False

    def follow(self, tensor: Any) -> _Seen:
        """Count from now on; a tensor that is gone leaves its id to another."""
        key = id(tensor)
        seen = _Seen(weakref.ref(tensor, lambda _: self.seen.pop(key, None)))
        self.seen[key] = seen
        return seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.saw_values |= func in _TO_PYTHON
        ids = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for key in ids & self.seen.keys():
            self.seen[key].reads += 1
        return func(*args, **kwargs)


def _convolutions() -> set[type[nn.Module]]:
    """Without subclasses, which may do something to their weights; timm's Conv2dSame only pads."""
    from timm.layers import Conv2dSame

    return {*CONVOLUTIONS, Conv2dSame}


def _is_constant_norm(module: nn.Module) -> bool:
    """Whether it multiplies each channel by a constant, with running statistics, in eval mode."""
    from timm.layers import BatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    if type(module) is FrozenBatchNorm2d:
        return True
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
    if type(module) not in batch_norms or module.training:
        return False
    return isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)


def _what_is_left(norm: nn.Module) -> nn.Module:
    """What a norm did beside the norm itself: timm's BatchNormAct2d ends in an activation."""
    ends = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    ends = [end for end in ends if type(end) is not nn.Identity]
    if len(ends) > 1:
        return nn.Sequential(*ends)
    return ends[0] if ends else nn.Identity()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            yield tensor
