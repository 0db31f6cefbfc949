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

# How near is "near": 1 % of the start, of the block's mean gate, or of the greatest gate.
NEAR = 0.01


@dataclass(frozen=True, eq=False)
class BlockGates:
    """The gates of one SE block over all images. A tensor [C] has a number for each channel."""

    block: str  # "layer1.0", or "layer1.0.se2" in a block with several SE blocks
    formula: str  # of the gate: "2 * sigmoid"
    maximum: float | None  # that the formula can reach; None: there is no end
    by_position: bool  # squeeze="none": the gates are means over the positions of a map
    images: int  # calls of the block with one image each
    channel_mean: Tensor  # [C]
    channel_variance: Tensor  # [C], over the images
    channel_low: Tensor  # [C], the least gate of all images (and positions)
    channel_high: Tensor  # [C], the greatest
    channel_within: Tensor | None  # [C], the variance within a class
    class_means: Tensor | None  # [classes, C]; a class without images has 0
    class_images: Tensor | None  # [classes]

    @property
    def channels(self) -> int:
        return len(self.channel_mean)

    @property
    def mean(self) -> float:
        """Of all gates."""
        return float(self.channel_mean.mean())

    @property
    def spread(self) -> float:
        """Standard deviation of a channel's gate over the images (root mean square of channels)."""
        return float(self.channel_variance.mean().sqrt())

    @property
    def within(self) -> float | None:
        """Standard deviation of a channel's gate over the images of one class."""
        return None if self.channel_within is None else float(self.channel_within.mean().sqrt())

    @property
    def between(self) -> float | None:
        """Standard deviation between classes: what of the spread is not within a class.

        Chance alone gives the means of small classes some spread; it is taken off.
        """
        if self.channel_within is None:
            return None
        rest = self.channel_variance.mean() - self.channel_within.mean()
        return float(rest.clamp(min=0).sqrt())

    @property
    def class_share(self) -> float | None:
        """The share of the variance that is between classes: 1 if the class alone decides."""
        total = float(self.channel_variance.mean())
        return None if self.between is None or total == 0 else self.between**2 / total

    @property
    def channel_deviation(self) -> Tensor:
        """[C]: how far any image's gate is from the channel's mean, of the block's mean gate."""
        scale = self.channel_mean.abs().mean()
        far = torch.maximum(
            self.channel_high - self.channel_mean, self.channel_mean - self.channel_low
        )
        # Rounding of the mean is no deviation.
        far = torch.where(self.channel_high == self.channel_low, 0.0, far)
        return torch.where(far == 0, far, far / scale)

    @property
    def deviation(self) -> float:
        """The greatest of ``channel_deviation``: what a constant in place of the gate changes."""
        return float(self.channel_deviation.max())

    @property
    def idle(self) -> float:
        """The share of channels whose gate is always within 1 % of 1, where training starts."""
        near = (self.channel_low >= 1 - NEAR) & (self.channel_high <= 1 + NEAR)
        return float(near.double().mean())

    @property
    def constant(self) -> float:
        """The share of channels whose gate never leaves its mean by more than 1 % of the block's
        mean gate: a fixed rescaling of the channel.
        """
        return float((self.channel_deviation <= NEAR).double().mean())

    @property
    def near_zero(self) -> float:
        """The share of channels that the gate always shuts: within 1 % of its maximum from 0."""
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
    """Run ``model`` over all images, in eval mode, and sum up what its gates do.

    Only one batch of gates is held at a time, and for each block the mean of each class. The
    model's modes are as before afterwards.

    Args:
        loader: gives batches: images [N, C, H, W], or a tuple of images, labels [N] and whatever
            comes after them. Images are moved to the device of the model.
        classes: their names, or how many there are. Without it, nothing is said of classes and no
            labels are read.

    Raises:
        NoSiteError: the model has no SE block.
        DataError: the loader gives no image, or gates of them are no finite numbers.
        ArgumentError: batches or labels are not as described.
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
    """Images and labels of each batch; None for labels that are not wanted."""
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
    """Eval mode without gradients; each module's own mode is back afterwards."""
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
    """Where the model's weights are."""
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
