"""The SE block as an ``nn.Module``."""

from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from se_inject.layers import fused
from se_inject.layers.gates import Gate, GateLayer, Init
from se_inject.layers.hooks import is_watched
from se_inject.layers.layout import CONVOLUTIONS, IMAGES, Convolution, Layout, pointwise
from se_inject.layers.scale_add import add, scale_add, times
from se_inject.layers.squeezes import SQUEEZES, Squeeze

# symbolic_trace (used by torchvision's create_feature_extractor and by quantization) takes
# scale_add as a leaf, because it asks for strides and dtypes, which the tracer does not know.
fx.wrap("scale_add")


def bottleneck_width(channels: int, r: int, divisor: int = 8) -> int:
    """The width of the SE bottleneck: ``channels / r`` rounded to a multiple of ``divisor``.

    A half is rounded up, and the width is never below ``divisor``. The widths equal those of timm's
    SE networks, which use ``timm.layers.make_divisible(channels / r, divisor, round_limit=0.)``.
    ``divisor=1`` gives the paper's plain C/r, rounded to the nearest integer and never below 1.

    >>> bottleneck_width(256, 16), bottleneck_width(64, 16), bottleneck_width(64, 16, divisor=1)
    (16, 8, 4)
    """
    return max(divisor, int(channels / r + divisor / 2) // divisor * divisor)


class SqueezeExcite(nn.Module):
    """Squeeze-and-Excitation (Hu et al., arXiv 1709.01507, eq. 2 to 4) for maps [N, C, H, W].

    The block squeezes with ``z = mean of x over H, W``, excites with
    ``s = gate(fc2(relu(fc1(z))))``, and scales the map to ``x * s``.

    The children are named and shaped as in ``timm.layers.SEModule``, so that timm's checkpoints
    fit: ``fc1`` [rd, C, 1, 1] and ``fc2`` [C, rd, 1, 1] are 1x1 convolutions with bias. For video
    maps [N, C, T, H, W] they are 1x1x1 convolutions, and for channels-last maps [N, H, W, C] they
    are Linear layers.

    ``init="identity"`` sets the parameters of ``fc2`` to 0, so that ``fc2`` returns 0 for every
    input, and uses a gate that is exactly 1 at 0. A pretrained network then computes what it did
    before. ``init="paper"`` uses the paper's formula on randomly initialised layers:

    ============  ==================  ==================
    gate          ``"paper"``         ``"identity"``
    ============  ==================  ==================
    sigmoid       sigmoid(z)          2 * sigmoid(z)
    tanh          tanh(z)             1 + tanh(z)
    relu          max(z, 0)           max(1 + z, 0)
    hard_sigmoid  relu6(z + 3) / 6    relu6(z + 3) / 3
    ============  ==================  ==================

    ``shift=True`` is SE with an additive bias, which chess networks such as Leela's have. ``fc2``
    [2C, rd, 1, 1] then returns two numbers for each channel. The first goes into the gate, and the
    second is added after the scaling: ``x * s + shift``. With ``init="identity"`` the shift starts
    at 0.

    At an addition the block computes the sum of branch and shortcut in one pass. If the block has
    hooks (Grad-CAM and Captum use them), it is called with the branch alone, and the shortcut is
    added to what it returns. The hooks then see branch x gate, as on ``timm.layers.SEModule``. This
    sum rounds twice where the single pass may round once. While all gates are 1, both sums are
    equal to the last bit. The gate is a module of its own, ``gate``, whose output hooks can watch.

    The two layers run as matrix products on the vectors [N, C]. Where hooks are on ``fc1`` or
    ``fc2``, or another layer has taken their place, they are called, and the convolutions round
    otherwise than the products. On CUDA a block with the mean as its squeeze, the sigmoid and no
    shift runs as Triton kernels (:mod:`se_inject.layers.fused`), with the same exceptions. Its
    gates are then float32 under autocast too.

    Args:
        channels: C, the number of channels of the map.
        bottleneck: rd, the width between the two layers (see :func:`bottleneck_width`).
        layout: which dims of the map are which; [N, C, H, W] by default.
        squeeze: ``"avg"`` takes the mean over H, W, and ``"max"`` the maximum (the paper's Table
            11). ``"none"`` is the paper's NoSqueeze (Table 16): the two layers run at every
            position, and the gate [N, C, H, W] differs from position to position.
        gate: a row of the table above (the paper's Table 12).
        bias: whether the two layers have biases. Those of the paper's ablations have none.
        init: a column of the table above.
        shift: whether the block also adds a number to each channel, as described above.
        device, dtype: where the new parameters are, and of which type.
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
        # The identity start needs no random numbers. Drawing them takes longer than making zeros.
        zero = init == "identity"
        out = 2 * channels if shift else channels
        self.fc2 = pointwise(layout, bottleneck, out, bias, device, dtype, zero=zero)
        self.gate = GateLayer(gate, init)
        self.set_plain(False)

    def set_plain(self, plain: bool) -> None:
        """Compute with mean, multiply and add from now on, or switch back to the single pass.

        See :func:`se_inject.set_plain_ops`.
        """
        self.plain = plain
        kind = SQUEEZES[self.squeeze]
        # The function is an attribute, because TorchScript cannot read the table.
        self._squeeze = kind.plain if plain else kind.of

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]  # torch's
        return {k: v for k, v in state.items() if k != "_squeeze"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A block that was pickled before variants existed does not say which one it is. One that
        # was pickled before the gate was a module holds the name of the gate.
        old: dict[str, Any] = {"squeeze": "avg", "gate": "sigmoid", "init": "identity"}
        state = old | {"plain": False, "shift": False} | state
        name, init = state.pop("gate"), state.pop("init")
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        if "gate" not in self._modules:
            self.gate = GateLayer(name, init)
        self.set_plain(self.plain)

    def to_literal_gate(self) -> None:
        """Switch to the gate as the paper writes it. The parameters stay as they are."""
        self.gate.to_literal()

    @property
    def init(self) -> Init:
        """Which form of its gate the block has."""
        return self.gate.init

    @property
    def gate_scale(self) -> float | None:
        """The factor between this gate and the paper's, or None if it is not a multiple of that."""
        return self.gate.scale

    def reset_parameters(self) -> None:
        """Initialise the layers again, for instance after ``to_empty()`` of a model on meta."""
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
        """Call :meth:`forward`. Where the call is watched, the shortcut is added outside of it."""
        scaled: Tensor
        if residual is None:
            scaled = super().__call__(x)
            return scaled
        if is_watched(self, x):
            scaled = super().__call__(x)
            if isinstance(x, fx.Proxy) and in_place:  # A tracer knows no dtypes to compare.
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
        """Scale the branch map ``x``, such as [N, C, H, W], and add ``residual`` if it is given.

        The result is ``x * s``, or ``residual + x * s`` in one pass (``torch.addcmul``) that does
        not write ``x * s`` to memory. A shift is added to the residual first. The flags say which
        sum the block replaces: ``residual_first`` means ``residual + x``, and ``in_place`` means
        ``x += residual``, which without autograd is written to the memory of ``x`` as before. If
        the two maps differ in memory format, the sum has the format of its first operand. If they
        differ in dtype, a sum in place keeps the dtype of ``x``.
        """
        # TorchScript knows neither hooks nor the kernels. is_scripting is public but not in torch's
        # __all__.
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            squeezed = self._squeeze(x, self.space)
            z, shift = self.gate_and_shift(self.fc2(torch.relu(self.fc1(squeezed))))
            gate, factor = self.gate(z), 1.0
        else:
            total = self._fused(x, residual, in_place)
            if total is not None:
                return total
            z, shift = self.gate_and_shift(self._excited(self._squeeze(x, self.space)))
            gate, factor = _gate_and_factor(self.gate, z)
        if residual is not None and not self.plain:
            base = residual if shift is None else residual + shift
            return scale_add(base, x, gate, factor, residual_first, in_place)
        scaled = x * times(gate, factor)
        if shift is not None:
            scaled = scaled + shift
        return scaled if residual is None else add(scaled, residual, residual_first, in_place)

    @torch.jit.unused
    def _fused(self, x: Tensor, residual: Tensor | None, in_place: bool) -> Tensor | None:
        """The result of :meth:`forward` by kernels for CUDA, or None where they do not apply."""
        # Asked first, because on a CPU this is all that the kernels cost.
        if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
            return None
        fc1, fc2, gate = self._children()
        if (
            self.plain
            or self.shift
            or self.squeeze != "avg"
            or x.dim() != len(self.space) + 2
            or not _is_convolution_alone(fc1, x)
            or not _is_convolution_alone(fc2, x)
            or is_watched(gate, x)
            or gate.name != "sigmoid"
        ):
            return None
        layers = *_parameters(fc1), *_parameters(fc2)
        if (
            not fused.takes(x, residual, *layers)
            or (residual is not None and not _alike(x, residual))
            or not fused.takes_layers(x, *layers)
            or layers[2].shape[0] != x.shape[1]
        ):
            return None
        return fused.squeeze_excite(x, residual, *layers, gate.factor, in_place)

    @torch.jit.unused
    def _excited(self, squeezed: Tensor) -> Tensor:
        """``fc2(relu(fc1(squeezed)))``, as two matrix products where nobody can tell.

        A convolution of one position takes up to twice as long as the product of its weight and
        the vectors [N, C], and its call as long again: on small maps that is most of what an SE
        block costs. Layers that somebody watches or has replaced (hooks, parametrizations,
        adapters, quantization, offloading) are called.
        """
        fc1, fc2, _ = self._children()
        if (
            self.plain
            or self.squeeze == "none"  # The gate differs from position to position.
            or not _is_convolution_alone(fc1, squeezed)
            or not _is_convolution_alone(fc2, squeezed)
            or squeezed.dim() != len(self.space) + 2
        ):
            excited: Tensor = fc2(torch.relu(fc1(squeezed)))
            return excited
        (w1, b1), (w2, b2) = _parameters(fc1), _parameters(fc2)
        hidden = F.linear(squeezed.flatten(1), w1.flatten(1), b1)
        z = F.linear(torch.relu(hidden), w2.flatten(1), b2)
        for _ in self.space:
            z = z.unsqueeze(-1)
        return z

    @torch.jit.unused
    def _children(self) -> tuple[nn.Module, nn.Module, GateLayer]:
        """``fc1``, ``fc2`` and ``gate``, from the table of the module.

        A module looks its children and parameters up ten times as slowly as its table does, and
        that is a tenth of what a block costs on a small map.
        """
        children: dict[str, Any] = self._modules
        return children["fc1"], children["fc2"], children["gate"]

    def gate_and_shift(self, excited: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split the output of ``fc2`` into the input of the gate and the shift, if there is one."""
        if not self.shift:
            return excited, None
        dim = -1 - len(self.space) if -1 in self.space else -1  # from the end, as in self.space
        c = self.channels
        return excited.narrow(dim, 0, c), excited.narrow(dim, c, c)

    def extra_repr(self) -> str:
        formula = self.gate.extra_repr()
        shift = ", shift=True" if self.shift else ""
        return f"gate={formula}, squeeze={self.squeeze}, space={tuple(self.space)}{shift}"


def _is_convolution_alone(layer: nn.Module, x: Any) -> TypeGuard[Convolution]:
    """Whether a call of the layer does nothing but convolve.

    Parametrizations, adapters and quantization replace its class, libraries that move weights
    between devices replace ``forward`` in the instance, and ``compile()`` sets a call of its own.
    """
    return (
        type(layer) in CONVOLUTIONS
        and "forward" not in layer.__dict__
        and layer._compiled_call_impl is None
        and layer._parameters.get("weight") is not None  # FSDP puts a tensor in its place
        and not is_watched(layer, x)
    )


def _parameters(layer: Convolution) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias."""
    table: dict[str, Any] = layer._parameters
    return table["weight"], table["bias"]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype


def _gate_and_factor(layer: GateLayer, z: Tensor) -> tuple[Tensor, float]:
    """The gate of ``z``, and the factor by which it must still be multiplied.

    The sum multiplies by the factor at no cost. If somebody watches the gate, the gate contains the
    factor already and 1 is returned for it.
    """
    if is_watched(layer, z):
        return layer(z), 1.0
    return layer.function(z), layer.factor
