"""Folds batch norms into the convolutions before them, if one forward shows that this is safe.

A norm in eval mode multiplies each channel by a constant and adds another. The convolution before
it can do both, if its output goes into that norm and nowhere else. Which operation reads which
tensor is observed while the network runs once.
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

# These tell Python about values: ``if x.mean() > 0``, ``torch.equal``, the number of boxes.
_TO_PYTHON = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
)


def run_once(model: nn.Module, given: Arguments) -> tuple[Any, list["Pair"]]:
    """What a model in eval mode returns, and which of its norms could be folded.

    A convolution and a norm are a pair if both are called once, have no hooks, and have weights
    that nothing else has or reads. The output of the convolution must be the input of the norm. No
    other operation may read it, and nobody may keep it when the forward is over. What runs after
    the forward has looked at values is left out, because it may be different for other images.
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

            # The default of ``calls`` binds the list of this module, not that of the last one.
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
    """The names of a convolution and of the norm that alone reads its output."""

    convolution: str
    norm: str


def fold_norms(model: nn.Module, pairs: Sequence[Pair]) -> list[str]:
    """Fold these norms, in place, and return the names of those that were folded."""
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
            continue  # as with float16 weights of a channel that hardly varies
        convolution.weight, convolution.bias = weight, bias
        owner, _, child = pair.norm.rpartition(".")
        model.get_submodule(owner)._modules[child] = _what_is_left(norm)
        folded.append(pair.norm)
    return folded


def is_touched(module: nn.Module) -> bool:
    """Whether hooks watch a module, or somebody has given it another forward."""
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
        """Count the reads of a tensor from now on. When it is gone, another may get its id."""
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
    """The classes of convolutions that count.

    A subclass may do something to its weights. timm's Conv2dSame only pads, so it counts.
    """
    from timm.layers import Conv2dSame

    return {*CONVOLUTIONS, Conv2dSame}


def _is_constant_norm(module: nn.Module) -> bool:
    """Whether a module multiplies each channel by a constant, as norms do in eval mode."""
    from timm.layers import BatchNormAct2d
    from torchvision.ops import FrozenBatchNorm2d

    if type(module) is FrozenBatchNorm2d:
        return True
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d)
    if type(module) not in batch_norms or module.training:
        return False
    return isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor)


def _what_is_left(norm: nn.Module) -> nn.Module:
    """What a norm did besides normalising. timm's BatchNormAct2d ends in an activation."""
    ends = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    ends = [end for end in ends if type(end) is not nn.Identity]
    if len(ends) > 1:
        return nn.Sequential(*ends)
    return ends[0] if ends else nn.Identity()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if tensor.is_floating_point():
            yield tensor
