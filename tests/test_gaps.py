"""Blocks that look residual and cannot be served: one warning, or with strict an error."""

import pytest
import torch
from torch import Tensor, nn

from se_inject import NoSiteError, inject_se, plan_se


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class SetsAnAttribute(Plain):
    """No graph can stand for it."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x + self.conv(x)


class NotResidual(Plain):
    """It cannot be traced either, and its addition is of attention scores, not of its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        q = x.flatten(2).unsqueeze(1)
        scores = q.transpose(-2, -1) @ q + q.transpose(-2, -1) @ q
        return self.conv(x) * scores.mean()


def net(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks)


X = torch.zeros(2, 3, 8, 8)


def test_a_gap_is_one_warning_that_counts_and_says_why() -> None:
    model = net(Plain(), SetsAnAttribute(), SetsAnAttribute())
    with pytest.warns(UserWarning, match="residual blocks have no SE block") as caught:
        inject_se(model, example_input=X)
    assert [str(w.message) for w in caught] == [
        "2 of 3 residual blocks have no SE block: cannot be traced. See plan_se(model).skipped."
    ]
    assert caught[0].filename == __file__
    assert hasattr(model[1], "se")


def test_strict_makes_it_an_error_and_changes_nothing() -> None:
    model = net(Plain(), SetsAnAttribute())
    keys = list(model.state_dict())
    with pytest.raises(NoSiteError, match="1 of 2 residual blocks have no SE block"):
        inject_se(model, example_input=X, strict=True)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "model", [net(Plain(), Plain()), net(Plain(), NotResidual())], ids=["all served", "no residual"]
)
def test_near_misses_say_nothing(model: nn.Module) -> None:
    assert plan_se(model, example_input=X, strict=True).gaps is None
    inject_se(model, example_input=X, strict=True)


def test_what_the_user_leaves_out_is_no_gap() -> None:
    model = net(Plain(), SetsAnAttribute())
    inject_se(model, example_input=X, exclude="2", strict=True)


class Head(nn.Module):
    """As of a detector: convolves every map, then needs values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 4, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([self.conv(x).flatten() for x in maps]).nonzero()


class Detector(nn.Module):
    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.after = net(Plain()), Head(), after

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        boxes = self.head([x])
        return self.after(x * len(boxes))


def test_a_detector_says_nothing_unless_a_block_comes_after_the_stop() -> None:
    assert len(plan_se(Detector(nn.Conv2d(16, 1, 1)), example_input=X).sites) == 1
    with pytest.warns(UserWarning, match="blocks that would run after that are not planned"):
        plan_se(Detector(Plain()), example_input=X)
