"""The SE block for inference: two matrix products, and a gate that can be computed early."""

import torch
from torch import Tensor, fx, nn

from se_inject.layers import fused
from se_inject.layers.hooks import is_watched
from se_inject.layers.layout import CONVOLUTIONS, Convolution
from se_inject.layers.scale_add import add, scale_add
from se_inject.layers.squeeze_excite import SqueezeExcite

fx.wrap("scale_add")  # squeeze_excite.py gives the reason


class DeployedSE(nn.Module):
    """An SE block for inference, whose outputs equal those of the original up to rounding.

    The layers are matrix products on the vectors [N, C], which take fewer steps than convolutions
    over one position. Where the map comes from a 1x1 convolution, :meth:`excite` can take the input
    of that convolution instead of its output. The mean over positions commutes with the
    convolution, so the weights of the convolution are multiplied into ``fc1``. The gate is then
    computed before the convolution runs.

    Args:
        se: the SE block, with ``squeeze="avg"`` and channels first.
        feed: the 1x1 convolution whose input :meth:`excite` will see, or None if it sees the map.
    """

    def __init__(self, se: SqueezeExcite, feed: Convolution | None = None) -> None:
        super().__init__()
        assert se.squeeze == "avg"
        assert isinstance(se.fc1, CONVOLUTIONS)
        weight, bias = se.fc1.weight.flatten(1), se.fc1.bias
        if feed is not None:
            weight, bias = _after(feed, weight, bias)
        self.fc1 = _linear(weight, bias)
        self.fc2 = _linear(se.fc2.weight.flatten(1), se.fc2.bias)
        self.gate = se.gate
        self.space = list(se.space)
        self.early = feed is not None
        self.set_plain(se.plain)
        self.train(se.training)

    def set_plain(self, plain: bool) -> None:
        """See :func:`se_inject.set_plain_ops`."""
        self.plain = plain

    def excite(self, x: Tensor) -> Tensor:
        """The gate, such as [N, C, 1, 1]. ``x`` is the map, or the input of ``feed``."""
        # TorchScript knows no such classes. is_scripting is public but not in torch's __all__.
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            fast = self._fused_gate(x)
            if fast is not None:
                return fast
        z = self.fc2(torch.relu(self.fc1(x.mean(self.space))))
        gate: Tensor = self.gate(z)
        for _ in self.space:
            gate = gate.unsqueeze(-1)
        return gate

    @torch.jit.unused
    def _fused_gate(self, x: Tensor) -> Tensor | None:
        """What :meth:`excite` returns, by kernels for CUDA, or None where they do not apply."""
        if type(x) is not Tensor or not x.is_cuda or torch.compiler.is_compiling():
            return None
        fc1, fc2, layer = self.fc1, self.fc2, self.gate
        if (
            self.plain
            or torch.is_grad_enabled()
            or x.dim() != len(self.space) + 2
            or type(fc1) is not nn.Linear
            or type(fc2) is not nn.Linear
            or layer.name != "sigmoid"
            or any(is_watched(m, x) for m in (fc1, fc2, layer))
        ):
            return None
        layers = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        if not fused.takes(x, None, *layers) or not fused.takes_layers(x, *layers):
            return None
        gate = fused.excite(x, *layers, layer.factor)
        return gate[(..., *(None,) * len(self.space))]

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_first: bool = False,
        in_place: bool = False,
        gate: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`SqueezeExcite.forward`. ``gate`` may be what :meth:`excite` returned."""
        if gate is None:
            gate = self.excite(x)
        if residual is None:
            return x * gate
        if self.plain:
            return add(x * gate, residual, residual_first, in_place)
        return scale_add(residual, x, gate, 1.0, residual_first, in_place)

    def extra_repr(self) -> str:
        return "squeeze before the last convolution" if self.early else ""


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    # The layer is made on meta, where it draws no random numbers. Its weights are replaced anyway.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _after(feed: Convolution, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of one layer that replaces ``feed`` and the layer after it.

    ``weight`` and ``bias`` are those of the layer after it.
    """
    wide = weight.double()
    composed = (wide @ feed.weight.flatten(1).double()).to(weight.dtype)
    if feed.bias is None:
        return composed, bias
    shift = wide @ feed.bias.double()
    return composed, (shift if bias is None else shift + bias.double()).to(weight.dtype)
