"""Which SE blocks could be folded into the layers before them, and why the others cannot."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from se_inject.edit.block_class import Edit
from se_inject.edit.insert import injected
from se_inject.errors import ArgumentError, NoSiteError
from se_inject.gates.statistics import BlockGates, GateStatistics, gate_statistics
from se_inject.keep.fold import Producers, scales_channels
from se_inject.layers.identity_start import kind_of_layer
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.names import Patterns
from se_inject.plan.checks import check_model
from se_inject.plan.select import selected


@dataclass(frozen=True)
class FoldableBlock:
    """A block whose SE blocks can all be folded. Both dicts have an entry for each SE child."""

    gates: dict[str, BlockGates]
    takes: dict[str, bool]  # whether the layer before can take the gates; otherwise they are all 1

    @property
    def deviation(self) -> float:
        return max(block.deviation for block in self.gates.values())


def foldable_blocks(
    model: nn.Module, loader: Iterable[Any], include: Patterns, exclude: Patterns
) -> tuple[dict[str, FoldableBlock], dict[str, str]]:
    """The blocks that could be folded, and for each other block why it cannot."""
    check_model(model)
    if iter(loader) is loader:
        raise ArgumentError(
            "the loader is an iterator, which can be gone through only once: pass a DataLoader or a"
            " list of batches."
        )
    blocks = {name: (module, edit) for name, module, edit in injected(model)}
    if not blocks:
        raise NoSiteError(f"{type(model).__name__} has no SE block. inject_se(model) inserts them.")
    wanted = selected(list(blocks), include, exclude, "block with an SE block")
    statistics = gate_statistics(model, loader)
    producers = Producers(model)
    groups: dict[str, FoldableBlock] = {}
    kept: dict[str, str] = {}
    for name, (module, edit) in blocks.items():
        if name not in wanted:
            kept[name] = "excluded by the user"
            continue
        found = _foldable(name, module, edit, statistics, producers)
        if isinstance(found, str):
            kept[name] = found
        else:
            groups[name] = found
    return groups, kept


def _foldable(
    name: str, module: nn.Module, edit: Edit, statistics: GateStatistics, producers: Producers
) -> FoldableBlock | str:
    """The gates of a block, or why it cannot be folded."""
    seen = {block.block: block for block in statistics.blocks}
    gates: dict[str, BlockGates] = {}
    takes: dict[str, bool] = {}
    for child, producer in zip(edit.children, edit.producers, strict=True):
        layer = getattr(module, child)
        own = name if len(edit.children) == 1 else f"{name}.{child}".lstrip(".")
        if not isinstance(layer, SqueezeExcite):
            return f"{kind_of_layer(layer)} is no SE block, and its scale is not known"
        if layer.shift:
            return "it adds a shift behind its gate, which no layer before it can take"
        if own not in seen:
            return "it did not run on these images"
        gates[child] = seen[own]
        source = producers.of(module, producer)
        takes[child] = source is not None and scales_channels(source, layer)
        if not takes[child] and gates[child].idle < 1:
            return (
                f"it scales the output of {producer or 'an operation'}, which is no norm or"
                " convolution that feeds it alone"
            )
    return FoldableBlock(gates, takes)
