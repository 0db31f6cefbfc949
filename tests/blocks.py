"""Hand-written blocks, and the check that injection keeps their function."""

from typing import Any

import torch
from torch import Tensor, nn

from se_inject import plan_se

X = torch.randn(2, 16, 8, 8)


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)


class Root(nn.Module):
    """Calls one block in the way that a test wants."""

    def __init__(self, block: nn.Module, call: Any = None) -> None:
        super().__init__()
        self.block = block
        self.plain = Plain()
        self._call = call or (lambda block, x: block(x))

    def forward(self, x: Tensor) -> Any:
        return self._call(self.block, self.plain(x))


class Plain(Unit):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


def same_before_and_after(root: nn.Module, training: bool = False, x: Tensor = X) -> list[str]:
    """Inject, compare to the bit, and return the blocks with a site."""
    root.train(training)

    def run() -> Any:
        torch.manual_seed(0)
        with torch.no_grad():
            return root(x.clone())

    before = run()
    plan = plan_se(root, example_input=x)
    plan.apply()
    torch.testing.assert_close(run(), before, rtol=0, atol=0)
    return [site.block for site in plan.sites]
