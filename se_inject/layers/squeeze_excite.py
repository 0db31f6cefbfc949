"""The SE block: the only new ``nn.Module``."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_inject.layers.gates import Gate, GateLayer, Init
from se_inject.layers.hooks import is_watched
from se_inject.layers.layout import CONVOLUTIONS, IMAGES, Layout, pointwise
from se_inject.layers.scale_add import add, scale_add, times
from se_inject.layers.squeezes import SQUEEZES, Squeeze

# symbolic_trace (of torchvision's create_feature_extractor, of quantization) takes scale_add for a
# leaf: it asks for strides and dtypes, which the tracer does not know.
fx.wrap("scale_add")


def bottleneck_width(channels: int, r: int, divisor: int = 8) -> int:
    """Width of the SE bottleneck: ``channels / r`` rounded to a multiple of ``divisor``.

    Rounds half up and is never below ``divisor``, as ``timm.layers.make_divisible(channels / r,
    divisor, round_limit=0.)`` does, so that widths equal those of timm's SE networks.
    ``divisor=1`` gives the paper's plain C/r (to the nearest integer, never below 1).

    >>> bottleneck_width(256, 16), bottleneck_width(64, 16), bottleneck_width(64, 16, divisor=1)
    (16, 8, 4)
    """
    return max(divisor, int(channels / r + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
    """Squeeze-and-Excitation (Hu et al., arXiv 1709.01507, eq. 2 to 4) for maps [N, C, H, W].

    squeeze ``z = mean of x over H, W``; excite ``s = gate(fc2(relu(fc1(z))))``; scale ``x * s``.

    The children are named and shaped as in ``timm.layers.SEModule``: ``fc1`` [rd, C, 1, 1] and
    ``fc2`` [C, rd, 1, 1], 1x1 convolutions with bias, so that timm's checkpoints fit. For video
    maps [N, C, T, H, W] they are 1x1x1 convolutions, for channels-last maps [N, H, W, C] Linears.

    ``init="identity"`` zeroes ``fc2``, so that it gives 0 whatever it sees, and takes a gate that
    is exactly 1 there: a pretrained network computes what it did before. ``init="paper"`` is the
    paper's formula over randomly initialised layers:

    ============  ==================  ==================
    gate          ``"paper"``         ``"identity"``
    ============  ==================  ==================
    sigmoid       sigmoid(z)          2 * sigmoid(z)
    tanh          tanh(z)             1 + tanh(z)
    relu          max(z, 0)           max(1 + z, 0)
    hard_sigmoid  relu6(z + 3) / 6    relu6(z + 3) / 3
    ============  ==================  ==================

    ``shift=True`` is SE with an additive bias, as chess networks such as Leela's have it: ``fc2``
    [2C, rd, 1, 1] gives two numbers a channel, of which the first goes into the gate and the second
    is added behind it, ``x * s + shift``. With ``init="identity"`` the shift is 0.

    At an addition the block gives the sum of branch and shortcut in one pass. Where hooks (of
    Grad-CAM, Captum, ...) are on the block, it is called with the branch alone, and the shortcut is
    added to what it returned: the hooks see branch x gate, as on ``timm.layers.SEModule``. Such a
    sum rounds twice where the one pass may round once; while all gates are 1, both are equal to the
    last bit. The gate has a module of its own, ``gate``, whose output hooks can watch.

    Args:
        channels: C, the channels of the map.
        bottleneck: rd, the width between the two layers (see :func:`bottleneck_width`).
        layout: of the map; [N, C, H, W] by default.
        squeeze: ``"avg"``; ``"max"``, the maximum over H, W (Table 11 of the paper); ``"none"``,
            its NoSqueeze (Table 16): the two layers run at every position, and the gate
            [N, C, H, W] differs from position to position.
        gate: a row of the table above (the paper's Table 12).
        bias: of both layers; the paper's ablations have none.
        init: a column of the table above.
        shift: whether the block also adds a number to each channel, as said above.
        device, dtype: of the new parameters.
    """

    __jit_unused_properties__: ClassVar[list[str]] = ["gate_scale", "init"]

    def __init__(
        self,
        channels: int,
        bottleneck: int,
        *,
        layout: Layout = IMAGES,
        squeeze: Squeeze = "avg",
        gate: Gate = "sigmoid",
        bias: bool = True,
        init: Init = "identity",
        shift: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.bottleneck = bottleneck
        self.squeeze = squeeze
        self.shift = shift
        self.space = list(layout.space)
        self.fc1 = pointwise(layout, channels, bottleneck, bias, device, dtype)
        # The identity start needs no random numbers, which cost more than the layer's memory does.
        zero = init == "identity"
        out = 2 * channels if shift else channels
        self.fc2 = pointwise(layout, bottleneck, out, bias, device, dtype, zero=zero)
        self.gate = GateLayer(gate, init)
        self.set_plain(False)

    def set_plain(self, plain: bool) -> None:
        """Compute with mean, multiply and add from now on, or in one pass again.

        See :func:`se_inject.set_plain_ops`.
        """
        self.plain = plain
        kind = SQUEEZES[self.squeeze]
        # The function is an attribute, because TorchScript reads no table.
        self._squeeze = kind.plain if plain else kind.of

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's
        return {k: v for k, v in state.items() if k != "_squeeze"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A block that was pickled before there were variants does not say which one it is, and one
        # that was pickled before its gate was a module holds the name of the gate.
        old: dict[str, Any] = {"squeeze": "avg", "gate": "sigmoid", "init": "identity"}
        state = old | {"plain": False, "shift": False} | state
        name, init = state.pop("gate"), state.pop("init")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        if "gate" not in self._modules:
            self.gate = GateLayer(name, init)
        self.set_plain(self.plain)

    def to_literal_gate(self) -> None:
        """Change to the gate as the paper writes it; the parameters stay as they are."""
        self.gate.to_literal()

    @property
    def init(self) -> Init:
        """Which form of its gate the block has."""
        return self.gate.init

    @property
    def gate_scale(self) -> float | None:
        """The factor between this gate and the paper's; None where it is no multiple of that."""
        return self.gate.scale

    def reset_parameters(self) -> None:
        """Initialise the layers anew, as after ``to_empty()`` of a model that was built on meta."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()
        if self.init == "identity":
            for p in self.fc2.parameters():
                nn.init.zeros_(p)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_first: bool = False,
        in_place: bool = False,
    ) -> Tensor:
        """As :meth:`forward`; where the call is watched, the shortcut is added outside of it."""
        scaled: Tensor
        if residual is None:
            scaled = super().__call__(x)
            return scaled
        if is_watched(self, x):
            scaled = super().__call__(x)
            if isinstance(x, fx.Proxy) and in_place:  # A tracer knows no dtype to compare.
                return add(scaled, residual).type_as(scaled)
            return add(scaled, residual, residual_first, in_place)
        total: Tensor = super().__call__(x, residual, residual_first, in_place)
        return total

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_first: bool = False,
        in_place: bool = False,
    ) -> Tensor:
        """Scale the branch map ``x``, such as [N, C, H, W]; with ``residual``, also add it.

        Returns ``x * s``, or ``residual + x * s`` in one pass (``torch.addcmul``), which never
        writes ``x * s`` to memory. A shift goes onto the residual first. The flags
        tell which sum is replaced: ``residual + x``, or ``x += residual``, which without autograd
        is written to the memory of ``x`` as before.
        Where the two maps differ in memory format, a sum has that of its first operand; where
        they differ in dtype, one in place keeps it.
        """
        squeezed = self._squeeze(x, self.space)
        # TorchScript knows no hooks. The question is public, though not in torch's __all__.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            z, shift = self.gate_and_shift(self.fc2(torch.relu(self.fc1(squeezed))))
            gate, factor = self.gate(z), 1.0
        else:
            z, shift = self.gate_and_shift(self._excited(squeezed))
            gate, factor = _gate_and_factor(self.gate, z)
        if residual is not None and not self.plain:
            base = residual if shift is None else residual + shift
            return scale_add(base, x, gate, factor, residual_first, in_place)
        scaled = x * times(gate, factor)
        if shift is not None:
            scaled = scaled + shift
        return scaled if residual is None else add(scaled, residual, residual_first, in_place)

    @torch.jit.unused
    def _excited(self, squeezed: Tensor) -> Tensor:
        """``fc2(relu(fc1(squeezed)))``, as two matrix products where nobody can tell.

        A convolution of one position takes up to twice as long as the product of its weight and
        the vectors [N, C], and its call as long again: on small maps that is most of what an SE
        block costs. Layers that somebody watches or has replaced (hooks, parametrizations,
        adapters, quantization, offloading) are called.
        """
        fc1, fc2 = self.fc1, self.fc2
        if (
            self.plain
            or self.squeeze == "none"  # The gate differs from position to position.
            or not _is_convolution_alone(fc1, squeezed)
            or not _is_convolution_alone(fc2, squeezed)
            or squeezed.dim() != len(self.space) + 2
        ):
            excited: Tensor = fc2(torch.relu(fc1(squeezed)))
            return excited
        hidden = F.linear(squeezed.flatten(1), fc1.weight.flatten(1), fc1.bias)
        z = F.linear(torch.relu(hidden), fc2.weight.flatten(1), fc2.bias)
        return z.view(*z.shape, *(1,) * len(self.space))

    def gate_and_shift(self, excited: Tensor) -> tuple[Tensor, Tensor | None]:
        """What ``fc2`` gives, taken apart: what the gate is of, and the shift if there is one."""
        if not self.shift:
            return excited, None
        dim = -1 - len(self.space) if -1 in self.space else -1  # counted as the dims of the space
        c = self.channels
        return excited.narrow(dim, 0, c), excited.narrow(dim, c, c)

    def extra_repr(self) -> str:
        formula = self.gate.extra_repr()
        shift = ", shift=True" if self.shift else ""
        return f"gate={formula}, squeeze={self.squeeze}, space={tuple(self.space)}{shift}"


def _is_convolution_alone(layer: nn.Module, x: Any) -> bool:
    """Whether a call of the layer does nothing but convolve.

    Parametrizations, adapters and quantization replace its class, libraries that move weights
    between devices replace ``forward`` in the instance, and ``compile()`` sets a call of its own.
    """
    return (
        type(layer) in CONVOLUTIONS
        and "forward" not in layer.__dict__
        and layer._compiled_call_impl is None
        and not is_watched(layer, x)
    )


def _gate_and_factor(layer: GateLayer, z: Tensor) -> tuple[Tensor, float]:
    """The gate of ``z`` and what it is still to be multiplied by.

    The factor is left to the sum, where it costs nothing, unless somebody watches the gate.
    """
    if is_watched(layer, z):
        return layer(z), 1.0
    return layer.function(z), layer.factor
