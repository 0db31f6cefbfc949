"""SE blocks for a network that is in no library, with residuals in every way people write them.

python examples/own_network.py
se-inject own_network:build --img-size 32 --show plus_equals    # run it in this directory

The blocks know nothing of se_inject. If a forward cannot be followed, the report says so and gives
the reason, and the rest of the network still gets its SE blocks.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from se_inject import inject_se, plan_se, remove_se


def body(channels: int, out_channels: int | None = None, stride: int = 1) -> nn.Sequential:
    """Two 3x3 convolutions."""
    out_channels = out_channels or channels
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = body(channels)


class Plus(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class PlusEquals(Block):
    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x
        return F.relu(out)


class TorchAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.add(self.body(x), x))


class AddMethod(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x).add_(x))


class Downsample(nn.Module):
    """A projection on the shortcut."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = body(channels, out_channels, stride=2)
        self.shortcut = nn.Conv2d(channels, out_channels, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Residual(nn.Module):
    """A wrapper around any module. The SE block goes behind the whole module."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class GivenShortcut(Block):
    """The caller computes the shortcut (as DLA does)."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        shortcut = x if shortcut is None else shortcut
        return F.relu(self.body(x) + shortcut)


class ThreeTerms(Block):
    """Two branches, whose sum is scaled by one SE block."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x), self.pointwise(x)
        return F.relu(a + b + x)


class Functional(Block):
    """Asks for the mode itself, so its graphs in train and eval mode differ. Both are kept."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.dropout(self.body(x), 0.1, training=self.training)
        if self.training:
            out = out * 0.5
        return F.relu(x + out)


class TwoInTwoOut(Block):
    """Takes several inputs and returns a tuple."""

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        out = x + self.body(x + context)
        return F.relu(out), context * 0.5


class StarArgs(Block):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return args[0] + self.body(args[0]) * kwargs["gain"]


class DataDependent(Block):
    """Asks a tensor which way to go. No graph can express that, so the block is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 0.5
        return x + self.body(x)


class OwnNet(nn.Module):
    """The whole network, for images [N, 3, 32, 32]."""

    def __init__(self, classes: int = 10, channels: int = 32) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(3, c, 3, padding=1, bias=False)
        self.plus = Plus(c)
        self.plus_equals = PlusEquals(c)
        self.torch_add = TorchAdd(c)
        self.add_method = AddMethod(c)
        self.wrapped = Residual(nn.Sequential(body(c), nn.ReLU(), nn.Conv2d(c, c, 1)))
        self.shared = Plus(c)
        self.downsample = Downsample(c, 2 * c)
        self.given_shortcut = GivenShortcut(2 * c)
        self.three_terms = ThreeTerms(2 * c)
        self.functional = Functional(2 * c)
        self.two_in_two_out = TwoInTwoOut(2 * c)
        self.star_args = StarArgs(2 * c)
        self.data_dependent = DataDependent(2 * c)
        self.last = body(2 * c)
        self.head = nn.Linear(2 * c * 16 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.add_method(self.torch_add(self.plus_equals(self.plus(x))))
        x = self.wrapped(x)
        x = self.shared(self.shared(x))  # the block is called twice, and gets one SE block
        x = self.downsample(x)
        x = self.given_shortcut(x, shortcut=x)
        x = self.functional(self.three_terms(x))
        x, context = self.two_in_two_out(x, x)
        x = self.star_args(x, gain=context)
        x = self.data_dependent(x)
        x = x + self.last(x)  # in the model's own forward, so its SE block is `model.se`
        return self.head(x.flatten(1))


def build() -> nn.Module:
    """What ``se-inject own_network:build`` calls."""
    return OwnNet()


def same_in_both_modes(model: nn.Module, images: Tensor, edit: Callable[[], object]) -> bool:
    """Whether an edit leaves the model's outputs in eval and train mode equal to the last bit."""

    def outputs(training: bool) -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return model.train(training)(images)

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = [outputs(training) for training in (False, True)]
    edit()
    model.load_state_dict(state, strict=False)  # train mode has moved the BatchNorm statistics
    after = [outputs(training) for training in (False, True)]
    return all(map(torch.equal, before, after))


def main() -> None:
    console = Console(highlight=False)
    torch.manual_seed(0)
    model = build()
    images = torch.randn(4, 3, 32, 32)

    # The printed plan says what these two warnings say.
    warnings.filterwarnings("ignore", message=".*asks tensors for their values")
    warnings.filterwarnings("ignore", message=".*residual blocks have no SE block")
    # The head takes only 32x32 images. The plan can find that out by itself, or be told as here.
    plan = plan_se(model, r=16, example_input=images)
    console.print(plan)
    console.print("Left alone:")
    for skipped in plan.skipped:
        console.print(
            f"  {skipped.block}: {skipped.reason}", skipped.detail and f"({skipped.detail})"
        )

    same = same_in_both_modes(model, images, lambda: inject_se(model, example_input=images))
    console.print(f"in eval and train mode, equal to the last bit: {same}")
    console.print(f"its blocks: {type(model).__name__}, {type(model.plus).__name__}, ...")
    console.print(f"new keys: {[k for k in model.state_dict() if '.se.' in k][:2]} ...")

    remove_se(model)
    console.print(f"after remove_se: {type(model).__name__}, {type(model.plus).__name__}, ...")


if __name__ == "__main__":
    main()
