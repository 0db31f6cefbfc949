"""SE blocks for a network that is in no library.

python examples/own_network.py
se-inject own_network:build --show stages.1    # in this directory: the report
"""

import torch
from rich.console import Console
from torch import Tensor, nn

from se_inject import inject_se, plan_se, remove_se


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut: nothing here knows of se_inject."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == out_channels
            else nn.Conv2d(channels, out_channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu(out)


class SmallNet(nn.Module):
    """For 32x32 images."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.stages = nn.Sequential(Residual(32, 32), Residual(32, 64, 2), Residual(64, 128, 2))
        self.head = nn.Linear(128 * 8 * 8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).flatten(1))


def build() -> nn.Module:
    """What ``se-inject own_network:build`` calls."""
    return SmallNet()


def main() -> None:
    console = Console(highlight=False)
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = model(images)

    # The head takes 32x32 images only; the plan finds that out by itself, or is told so:
    console.print(plan_se(model, r=16, example_input=images))

    inject_se(model, r=16, example_input=images)
    with torch.no_grad():
        console.print(f"equal to the last bit: {torch.equal(before, model(images))}")
    console.print(f"still a {type(model).__name__}, its blocks: {type(model.stages[0]).__name__}")
    console.print(f"new keys: {[k for k in model.state_dict() if '.se.' in k][:2]} ...")

    remove_se(model)
    console.print(f"after remove_se: {type(model.stages[0]).__name__}")


if __name__ == "__main__":
    main()
