"""Folds SE blocks that act as a constant into the weights of the layers before them.

If a gate is the same number c for every image, the norm before it can give ``x * c`` at once: its
weight and bias are multiplied by c. Gates that are powers of two are folded to the last bit, and
other gates up to rounding. A gate that is only nearly constant is replaced by its mean, and the
change that this makes is measured.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.insert import injected, restore
from se_inject.errors import ArgumentError
from se_inject.gates.advice import globs
from se_inject.gates.change import Change, measure_change
from se_inject.gates.foldable import FoldableBlock, foldable_blocks
from se_inject.gates.statistics import NEAR, BlockGates
from se_inject.keep.fold import Producers, affine
from se_inject.names import Patterns, plural


@dataclass(frozen=True)
class Folding:
    """What :func:`fold_se` or :func:`prune_se` did."""

    folded: tuple[str, ...]  # the blocks that have no SE block any more
    kept: dict[str, str]  # block -> why it keeps its SE block
    changed: tuple[str, ...]  # the names of the tensors whose values have changed
    params: int  # how many parameters the model has lost
    change: Change  # the measured change of the outputs

    def __str__(self) -> str:
        names = [*self.folded, *self.kept]
        where = f": {', '.join(globs(self.folded, names))}" if self.folded else ""
        return (
            f"Folded {len(self.folded)} of {plural(len(names), 'block')} with SE{where};"
            f" {self.params:,} parameters fewer; {self.change}."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {**vars(self), "change": self.change.to_dict()}


def fold_se(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    tolerance: float = NEAR,
) -> Folding:
    """Fold the SE blocks whose gate is constant over the given images, in place.

    The mean gate of each channel is multiplied into the weight and bias of the norm or convolution
    before the SE block. The SE block is then taken out. If there is no such layer, the SE block is
    taken out only if its gates are 1. If anything fails, the model stays as it was.

    Args:
        loader: gives batches as :func:`gate_statistics` takes them. It is used twice, once for the
            gates and once to measure the change of the outputs, so a generator does not work.
        include, exclude: one glob or several globs on block names. Where both match a block,
            ``exclude`` wins.
        tolerance: how far a gate may be from its mean, as a share of the block's mean gate. With 0,
            only gates that are constant to the last bit are folded.

    Returns:
        Which blocks were folded and which were not, and the largest change of the outputs over the
        images. If only some blocks were folded, save the model with
        ``save_se(model, path, extra=[*folding.changed])``.

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: a glob matches no block, the loader can be used only once, a batch is not as
            described, or ``tolerance`` is negative.
        DataError: the loader gives no image, or a gate or an output is not a finite number.
        UnsupportedModelError: the model cannot be edited as it is, because it is compiled, sharded
            or wrapped.
    """
    if not tolerance >= 0:
        raise ArgumentError(f"tolerance={tolerance!r} must be 0 or more, such as 0.01 for 1 %.")
    groups, kept = foldable_blocks(model, loader, include, exclude)
    chosen = []
    for name, deviation in _by_deviation(groups):
        if deviation <= tolerance:
            chosen.append(name)
        else:
            kept[name] = f"its gates leave their mean by up to {100 * deviation:.2g} %"
    twin = _folded_copy(model, chosen, groups)
    return _apply(model, chosen, kept, groups, measure_change(model, twin, loader))


def prune_se(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_change: float,
    include: Patterns = None,
    exclude: Patterns = None,
) -> Folding:
    """Fold as many SE blocks as ``max_change`` allows, in place, even if they are not constant.

    Each gate is replaced by its mean over the images, beginning with the blocks whose gates vary
    least. A bisection finds how many blocks can go. Each of its steps measures the change of the
    outputs. If anything fails, the model stays as it was.

    Args:
        loader: the same as for :func:`fold_se`. It is used once more for each step of the
            bisection.
        max_change: the largest change that any output may have over the images, as a share of the
            largest output. For 1 %, pass 0.01.
        include, exclude: the same as for :func:`fold_se`.

    Returns:
        The same as :func:`fold_se`.

    Raises:
        ArgumentError: ``max_change`` is negative, or the same cases as for :func:`fold_se`.
        NoSiteError, DataError, UnsupportedModelError: the same cases as for :func:`fold_se`.
    """
    if not max_change >= 0:
        raise ArgumentError(f"max_change={max_change!r} must be 0 or more, such as 0.01 for 1 %.")
    groups, kept = foldable_blocks(model, loader, include, exclude)
    order = [name for name, _ in _by_deviation(groups)]

    def tried(count: int) -> Change:
        return measure_change(model, _folded_copy(model, order[:count], groups), loader)

    good, best = 0, tried(0)
    refused: dict[int, Change] = {}
    bad = len(order) + 1
    count = len(order)  # the first try folds all of them
    while bad - good > 1:
        change = tried(count)
        if change.relative <= max_change:
            good, best = count, change
        else:
            bad, refused[count] = count, change
        count = (good + bad) // 2
    for name in order[good:]:
        kept[name] = (
            f"without it and those that vary less, outputs change by up to"
            f" {100 * refused[good + 1].relative:.2g} %"
        )
    return _apply(model, order[:good], kept, groups, best)


def _by_deviation(groups: dict[str, FoldableBlock]) -> list[tuple[str, float]]:
    """The blocks with the deviation of their gates. Those whose gates vary least come first."""
    deviations = {name: block.deviation for name, block in groups.items()}
    return sorted(deviations.items(), key=lambda item: item[1])


def _folded_copy(
    model: nn.Module, names: Sequence[str], groups: dict[str, FoldableBlock]
) -> nn.Module:
    twin = copy.deepcopy(model)
    _fold(twin, names, groups)
    return twin


def _apply(
    model: nn.Module,
    chosen: Sequence[str],
    kept: dict[str, str],
    groups: dict[str, FoldableBlock],
    change: Change,
) -> Folding:
    before = _parameters(model)
    changed = _fold(model, chosen, groups)
    order = [name for name, _ in model.named_modules()]
    return Folding(
        folded=tuple(sorted(chosen, key=order.index)),
        kept={name: kept[name] for name in sorted(kept, key=order.index)},
        changed=tuple(changed),
        params=before - _parameters(model),
        change=change,
    )


def _fold(model: nn.Module, names: Sequence[str], groups: dict[str, FoldableBlock]) -> list[str]:
    """Fold these blocks, and return the names of the tensors whose values this changes."""
    if not names:
        return []
    scaled: list[tuple[Tensor, Tensor]] = []
    producers = Producers(model)
    for name, module, edit in injected(model):
        if name in names:
            for child, producer in zip(edit.children, edit.producers, strict=True):
                if groups[name].takes[child]:
                    source = producers.of(module, producer)
                    assert source is not None
                    scaled += [(t, _factor(groups[name].gates[child], t)) for t in affine(source)]
    restore(model, names)  # this may be refused, and no weight has been changed yet
    with torch.no_grad():
        for tensor, factor in scaled:
            tensor.mul_(factor)
    return list(_names_of(model, [tensor for tensor, _ in scaled]))


def _factor(gates: BlockGates, tensor: Tensor) -> Tensor:
    """The constant of each channel, in a shape that the weight or bias can be multiplied by."""
    # The mean of equal numbers may differ from them by a rounding.
    equal = gates.channel_low == gates.channel_high
    constant = torch.where(equal, gates.channel_low, gates.channel_mean)
    shape = (-1, *(1,) * (tensor.dim() - 1))
    return constant.reshape(shape).to(device=tensor.device, dtype=tensor.dtype)


def _names_of(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[str]:
    wanted = {id(tensor) for tensor in tensors}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in wanted:
            yield name


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
