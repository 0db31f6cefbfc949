"""What a network saves without some of its SE blocks: parameters, MACs and measured latency."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.edit.block_class import edit_of
from se_inject.edit.insert import restore
from se_inject.errors import NoSiteError
from se_inject.graph.copies import meta_copy
from se_inject.graph.example import batch_size as batch_size_of
from se_inject.graph.macs import run_and_count
from se_inject.graph.recording.call import Arguments
from se_inject.layers.cost import se_cost
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.names import plural
from se_inject.report.count import Count, count_model
from se_inject.report.latency import Latency, compare_latency


@dataclass(frozen=True)
class Savings:
    """The costs of one network before and after some of its SE blocks were folded or removed."""

    before: Count
    after: Count
    blocks: tuple[int, int]  # the number of SE blocks before and after
    latency: Latency | None  # None if it was not measured

    def __str__(self) -> str:
        params = self.before.params - self.after.params
        said = f"{plural(self.blocks[0], 'SE block')} → {self.blocks[1]}, {params:,} parameters"
        if self.before.macs is not None and self.after.macs is not None:
            said += f" and {(self.before.macs - self.after.macs) / 1e6:.2f} M MACs an image"
        said += " fewer"
        if self.latency is not None:
            low, middle, high = (100 * value for value in self.latency.overhead)
            said += (
                f"; {self.latency.before_ms:.2f} → {self.latency.after_ms:.2f} ms a batch of"
                f" {self.latency.batch_size} ({middle:+.1f} %; half of {self.latency.rounds} rounds"
                f" within {low:+.1f} to {high:+.1f} %)"
            )
        return f"{said}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data. It has the key ``latency`` only if the latency was measured."""
        data = {
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "blocks": list(self.blocks),
        }
        return data if self.latency is None else {**data, "latency": self.latency.to_dict()}


def measure_savings(
    before: nn.Module,
    after: nn.Module,
    *,
    benchmark: bool = False,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> Savings:
    """Compare an injected network with a copy of it that has fewer SE blocks.

    Args:
        before, after: for example, a ``copy.deepcopy(model)`` made before ``fold_se(model, ...)``,
            and the model. They stay as they are.
        benchmark: whether to measure the latency too. Copies run on ``device``.
        batch_size, device: the same as for :func:`se_inject.report.latency.measure_latency`.

    Raises:
        NoSiteError: ``before`` has no SE block.
    """
    example = example_of(before)
    latency = None
    if benchmark:
        networks = copy.deepcopy(before), copy.deepcopy(after)
        latency = compare_latency(*networks, example, batch_size=batch_size, device=device)
    return Savings(
        before=count_injected(before, example),
        after=count_injected(after, example),
        blocks=(_count_blocks(before), _count_blocks(after)),
        latency=latency,
    )


def example_of(model: nn.Module) -> Arguments:
    """The arguments with which the forward of an injected model was recorded, on meta.

    Raises:
        NoSiteError: the model has no SE block.
    """
    for module in model.modules():
        if edit := edit_of(module):
            return edit.settings.example
    raise NoSiteError(f"{type(model).__name__} has no SE block. inject_se(model) inserts them.")


def count_injected(model: nn.Module, example: Arguments) -> Count:
    """Count a network with SE blocks as the report does, with their squeeze and scale."""
    base = meta_copy(model)
    restore(base)
    plain = count_model(base, example)
    params = sum(p.numel() for p in model.parameters())
    if plain.macs is None:
        return Count(params, None)
    twin = meta_copy(model)
    spaces: dict[SqueezeExcite, list[tuple[int, ...]]] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SqueezeExcite)
        spaces.setdefault(layer, []).append(tuple(args[0].shape[dim] for dim in layer.space))

    for layer in twin.modules():
        if isinstance(layer, SqueezeExcite):
            layer.register_forward_pre_hook(note)
    _, whole = run_and_count(twin, *example)
    se_macs = 0
    for layer, seen in spaces.items():
        cost = se_cost(layer.channels, layer.bottleneck, seen, squeeze=layer.squeeze)
        se_macs += cost.squeeze + cost.scale
    # The count of the whole network includes the layers of the SE blocks already.
    return Count(params, whole // batch_size_of(example) + se_macs)


def _count_blocks(model: nn.Module) -> int:
    return sum(len(edit.children) for module in model.modules() if (edit := edit_of(module)))
