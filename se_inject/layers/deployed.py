"""The SE block of a network that only runs: two matrix products, and a gate that may come early."""

import torch
from torch import Tensor, fx, nn

from se_inject.layers.layout import CONVOLUTIONS
from se_inject.layers.scale_add import add, scale_add
from se_inject.layers.squeeze_excite import SqueezeExcite

fx.wrap("scale_add")  # for the reason that squeeze_excite gives

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class DeployedSE(nn.Module):
    """An SE block with a mean over positions, for inference: equal up to rounding.

    The layers are matrix products on the vectors [N, C], which take fewer steps than convolutions
    of one position. Where the map comes from a 1x1 convolution, :meth:`excite` takes the input of
    that convolution in place of its output: the mean over positions commutes with it, and its
    weights are multiplied into ``fc1``. The gate is then computed before the convolution runs.

    Args:
        se: the SE block, with ``squeeze="avg"`` and channels first.
        feed: the 1x1 convolution whose input :meth:`excite` is going to see.
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
        """The gate, such as [N, C, 1, 1], of the map, or of the input of the convolution before."""
        z = self.fc2(torch.relu(self.fc1(x.mean(self.space))))
        gate: Tensor = self.gate(z)
        for _ in self.space:
            gate = gate.unsqueeze(-1)
        return gate

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        residual_first: bool = False,
        in_place: bool = False,
        gate: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`SqueezeExcite.forward`; ``gate`` is what :meth:`excite` gave before."""
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
    # The weights are replaced, and a layer on meta draws no random number for those it has.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def _after(feed: Convolution, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The two layers in one: a 1x1 convolution, and then a layer of this weight and bias."""
    wide = weight.double()
    composed = (wide @ feed.weight.flatten(1).double()).to(weight.dtype)
    if feed.bias is None:
        return composed, bias
    shift = wide @ feed.bias.double()
    return composed, (shift if bias is None else shift + bias.double()).to(weight.dtype)
