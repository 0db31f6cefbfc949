"""What the gates of each SE block do over many images: ``gate_statistics``."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from se_inject.errors import ArgumentError, DataError
from se_inject.gates.record import mean_over_positions, observed
from se_inject.gates.streaming import GateMoments, Labels, extremes
from se_inject.layers.gates import GATES
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.squeezes import SQUEEZES

# "Near" means within 1 %: of the gate at the start, the block's mean gate, or the largest gate.
NEAR = 0.01


@dataclass(frozen=True, eq=False)
class BlockGates:
    """The gates of one SE block over all images. A tensor [C] has a number for each channel."""

    block: str  # "layer1.0", or "layer1.0.se2" in a block with several SE blocks
    formula: str  # the formula of the gate, such as "2 * sigmoid"
    maximum: float | None  # the largest value of the formula; None means unbounded
    by_position: bool  # with squeeze="none", each gate is a mean over the positions of a map
    images: int  # how many images the block saw, counted at each of its calls
    channel_mean: Tensor  # [C], the mean over the images
    channel_variance: Tensor  # [C], the variance over the images
    channel_low: Tensor  # [C], the smallest gate over all images (and positions)
    channel_high: Tensor  # [C], the largest gate over all images (and positions)
    channel_within: Tensor | None  # [C], the variance within a class
    class_means: Tensor | None  # [classes, C]; a class without images has 0
    class_images: Tensor | None  # [classes], the number of images of each class

    @property
    def channels(self) -> int:
        return len(self.channel_mean)

    @property
    def mean(self) -> float:
        """The mean of all gates."""
        return float(self.channel_mean.mean())

    @property
    def spread(self) -> float:
        """The standard deviation of a gate over the images, as the root mean square of channels."""
        return float(self.channel_variance.mean().sqrt())

    @property
    def within(self) -> float | None:
        """The standard deviation of a gate over the images of one class, or None if not known."""
        return None if self.channel_within is None else float(self.channel_within.mean().sqrt())

    @property
    def between(self) -> float | None:
        """The standard deviation between classes: the part of the spread not within a class.

        The means of small classes differ by chance alone. This part is subtracted.
        """
        if self.channel_within is None:
            return None
        rest = self.channel_variance.mean() - self.channel_within.mean()
        return float(rest.clamp(min=0).sqrt())

    @property
    def class_share(self) -> float | None:
        """The share of the variance that is between classes. It is 1 if the class alone decides."""
        total = float(self.channel_variance.mean())
        return None if self.between is None or total == 0 else self.between**2 / total

    @property
    def channel_deviation(self) -> Tensor:
        """[C]: how far a gate goes from its channel's mean, as a share of the block's mean gate."""
        scale = self.channel_mean.abs().mean()
        far = torch.maximum(
            self.channel_high - self.channel_mean, self.channel_mean - self.channel_low
        )
        # Rounding of the mean is no deviation.
        far = torch.where(self.channel_high == self.channel_low, 0.0, far)
        return torch.where(far == 0, far, far / scale)

    @property
    def deviation(self) -> float:
        """The largest ``channel_deviation``: how far a constant in place of a gate can be off."""
        return float(self.channel_deviation.max())

    @property
    def idle(self) -> float:
        """The share of channels whose gate is always within 1 % of 1, where training starts."""
        near = (self.channel_low >= 1 - NEAR) & (self.channel_high <= 1 + NEAR)
        return float(near.double().mean())

    @property
    def constant(self) -> float:
        """The share of channels whose gate is a fixed rescaling of the channel.

        Such a gate never differs from its mean by more than 1 % of the block's mean gate.
        """
        return float((self.channel_deviation <= NEAR).double().mean())

    @property
    def near_zero(self) -> float:
        """The share of channels whose gate is always nearly 0: at most 1 % of its maximum away."""
        end = NEAR * (self.maximum or 1.0)
        shut = (self.channel_high <= end) & (self.channel_low >= -end)
        return float(shut.double().mean())

    @property
    def near_maximum(self) -> float:
        """The share of channels whose gate is always within 1 % of its maximum."""
        if self.maximum is None:
            return 0.0
        return float((self.channel_low >= (1 - NEAR) * self.maximum).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the block as JSON-ready data, without those of each channel."""
        names = ["block", "formula", "by_position", "channels", "images", "mean", "spread"]
        names += ["between", "within", "class_share", "idle", "constant", "near_zero"]
        names += ["near_maximum", "deviation"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, eq=False)
class GateStatistics:
    """The gates of all SE blocks of a model over all images, in the order of the network."""

    blocks: tuple[BlockGates, ...]
    classes: tuple[str, ...] | None
    images: int

    def __getitem__(self, block: str) -> BlockGates:
        return next(b for b in self.blocks if b.block == block)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "images": self.images,
            "classes": None if self.classes is None else list(self.classes),
            "blocks": [block.to_dict() for block in self.blocks],
        }


def gate_statistics(
    model: nn.Module, loader: Iterable[Any], classes: Sequence[str] | int | None = None
) -> GateStatistics:
    """Run ``model`` on all images, in eval mode, and sum up what its gates do.

    Only the gates of one batch are held at a time, and the mean of each class for each block.
    Afterwards each module has its old train or eval mode again.

    Args:
        loader: gives batches. A batch is a tensor of images [N, C, H, W], or a tuple of images,
            labels [N] and anything else. The images are moved to the device of the model.
        classes: the names of the classes, or how many there are. Without it, no labels are read and
            the statistics say nothing about classes.

    Raises:
        NoSiteError: the model has no SE block.
        DataError: the loader gives no image, or a gate is not a finite number.
        ArgumentError: a batch or its labels are not as described.
    """
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else classes
    count = None if names is None else len(names)
    moments: dict[str, GateMoments] = {}
    layers: dict[str, SqueezeExcite] = {}
    labels: Labels | None = None
    images = size = 0

    def add(name: str, layer: SqueezeExcite, gate: Tensor) -> None:
        if len(gate) != size and labels is not None:
            raise ArgumentError(
                f"{name!r} sees a batch of {len(gate)} where the images are {size}: which of them"
                " is of which class is not known. Leave out classes=."
            )
        gates = mean_over_positions(layer, gate)
        low, high = extremes(gate, layer.space, SQUEEZES[layer.squeeze].pools)
        if name not in moments:
            moments[name], layers[name] = GateMoments(gates, count), layer
        moments[name].add(gates, low, high, labels)

    device = device_of(model)
    with evaluating(model), observed(model, add):
        for x, y in batches(loader, with_labels=count is not None):
            size = len(x)
            images += size
            labels = None if y is None or count is None else Labels.of(y, count).to(device)
            model(x.to(device, non_blocking=True))
    if not moments:
        raise DataError("the loader gives no image to see the gates of.")
    blocks = tuple(_block(name, layers[name], moments[name]) for name in moments)
    return GateStatistics(blocks, None if names is None else tuple(names), images)


def batches(
    loader: Iterable[Any], *, with_labels: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the images and the labels of each batch. The labels are None if they are not wanted."""
    for batch in loader:
        parts = batch if isinstance(batch, tuple | list) else (batch,)
        images = parts[0] if parts else None
        if not isinstance(images, Tensor) or not len(images):
            raise ArgumentError(
                "the loader must give images [N, ...], or a tuple of images and labels [N]; it"
                f" gives {type(images).__name__}."
            )
        if not with_labels:
            yield images, None
            continue
        if len(parts) < 2 or len(torch.as_tensor(parts[1])) != len(images):
            raise ArgumentError("classes= needs a loader of tuples (images, labels [N], ...).")
        yield images, torch.as_tensor(parts[1])


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode without gradients. Afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            for module, _ in modes:
                module.training = False
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """The device that the model's weights are on."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _block(name: str, layer: SqueezeExcite, moments: GateMoments) -> BlockGates:
    if not bool(torch.isfinite(moments.mean).all()):
        raise DataError(f"gates of {name!r} are not finite: the network overflows on these images.")

    def cpu(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cpu()

    gate = GATES[layer.gate.name]
    return BlockGates(
        block=name,
        formula=gate.formulas[layer.init],
        maximum=gate.maximum[layer.init],
        by_position=not SQUEEZES[layer.squeeze].pools,
        images=moments.images,
        channel_mean=moments.mean.cpu(),
        channel_variance=moments.variance.cpu(),
        channel_low=moments.low.cpu(),
        channel_high=moments.high.cpu(),
        channel_within=cpu(moments.variance_within),
        class_means=cpu(moments.class_means),
        class_images=cpu(moments.class_images),
    )
