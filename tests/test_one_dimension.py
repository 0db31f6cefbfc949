"""Maps [N, C, L] of Conv1d networks (ECG, audio); [N, L, C] of transformers are tokens."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import open_gates, randomize
from torch import Tensor, nn

from se_inject import (
    NoSiteError,
    SqueezeExcite,
    inject_se,
    load_se,
    plan_se,
    remove_se,
    save_se,
    se_parameters,
)
from se_inject.layers.cost import se_cost
from se_inject.layers.layout import Layout
from se_inject.reasons import Reason


class Block(nn.Module):
    def __init__(self, channels: int, out: int | None = None, stride: int = 1) -> None:
        super().__init__()
        out = out or channels
        self.conv1 = nn.Conv1d(channels, out, 7, stride, padding=3, bias=False)
        self.bn1 = nn.BatchNorm1d(out)
        self.conv2 = nn.Conv1d(out, out, 7, padding=3, bias=False)
        self.bn2 = nn.BatchNorm1d(out)
        self.drop = nn.Dropout(0.1)
        self.shortcut = nn.Identity()
        if stride > 1 or out != channels:
            self.shortcut = nn.Sequential(
                nn.Conv1d(channels, out, 1, stride, bias=False), nn.BatchNorm1d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.drop(self.bn2(self.conv2(y))) + self.shortcut(x))


class ECGNet(nn.Sequential):
    """Twelve leads, as electrocardiograms have them."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(12, 32, 15, 2, padding=7),
            Block(32),
            Block(32, 48, 2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(48, 5),
        )


class Gate(nn.Module):
    """An SE block of somebody else."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean(-1))).unsqueeze(-1)


class Gated(Block):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = Gate(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gate(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))) + x)


class ConvolvedTokens(nn.Module):
    """A block of a convolutional transformer: its sums are [N, L, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x).transpose(1, 2)).transpose(1, 2)


def test_sites_channels_and_costs() -> None:
    plan = plan_se(ECGNet())  # the default example fits twelve channels and one dimension
    assert [(s.block, s.channels, s.shape) for s in plan.sites] == [
        ("1", 32, (32, 512)),
        ("2", 48, (48, 256)),
    ]
    assert plan.input_size == [12, 1024]
    assert plan.sites[0].layout == Layout(3, 1)
    assert plan.sites[0].cost == se_cost(32, 8, [(512,)])
    assert plan.sites[0].macs == 2 * 32 * 8 + 2 * 32 * 512


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_outputs_stay_equal_and_removal_is_exact(placement: str, mode: str) -> None:
    model = randomize(ECGNet()).train(mode == "train")
    x = torch.randn(2, 12, 500)
    keys = list(model.state_dict())

    def run() -> Tensor:
        torch.manual_seed(1)
        return model(x)

    before = run()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    inject_se(model, example_input=x, placement=placement)
    model.load_state_dict(state, strict=False)
    assert torch.equal(run(), before)
    assert isinstance(model[1].get_submodule("se").fc1, nn.Conv1d)
    remove_se(model)
    assert list(model.state_dict()) == keys
    assert type(model[1]) is Block


@pytest.mark.parametrize(
    ("squeeze", "gate"),
    list(itertools.product(["avg", "max", "none"], ["sigmoid", "tanh", "relu", "hard_sigmoid"])),
)
def test_the_block_is_the_formula(squeeze: str, gate: str) -> None:
    block = SqueezeExcite(
        16, 8, layout=Layout(3, 1), squeeze=squeeze, gate=gate, init="paper", dtype=torch.float64
    )
    x, shortcut = (torch.randn(3, 16, 20, dtype=torch.float64) for _ in range(2))
    z = {"avg": lambda: x.mean(2, True), "max": lambda: x.amax(2, True), "none": lambda: x}
    w1, w2 = block.fc1.weight[:, :, 0], block.fc2.weight[:, :, 0]
    hidden = torch.relu(torch.einsum("rc,ncl->nrl", w1, z[squeeze]()) + block.fc1.bias[:, None])
    excited = torch.einsum("cr,nrl->ncl", w2, hidden) + block.fc2.bias[:, None]
    function = {"hard_sigmoid": F.hardsigmoid}.get(gate) or getattr(torch, gate)
    torch.testing.assert_close(block(x), x * function(excited))
    torch.testing.assert_close(block(x, shortcut), shortcut + x * function(excited))


def test_shut_gates_leave_the_shortcut() -> None:
    model = inject_se(randomize(ECGNet())).eval()
    block = model[2]
    with torch.no_grad():
        block.get_submodule("se").fc2.bias.fill_(-1e4)
        x = torch.randn(2, 32, 100)
        assert torch.equal(block(x), F.relu(block.shortcut(x)))


def test_every_parameter_learns_and_files_load(tmp_path: Path) -> None:
    base = randomize(ECGNet())
    state = {k: v.clone() for k, v in base.state_dict().items()}
    model = inject_se(base).eval()
    open_gates(model)
    x = torch.randn(2, 12, 300)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in se_parameters(model))
    save_se(model, tmp_path / "se.safetensors")
    fresh = ECGNet().eval()
    fresh.load_state_dict(state)
    assert torch.equal(load_se(fresh, tmp_path / "se.safetensors")(x), model(x))


@pytest.mark.parametrize(
    ("block", "reason"),
    [(Gated(32), Reason.GATED), (nn.Sequential(), None)],
    ids=["gated", "no addition"],
)
def test_near_misses(block: nn.Module, reason: Reason | None) -> None:
    with pytest.raises(NoSiteError) as caught:
        plan_se(nn.Sequential(nn.Conv1d(12, 32, 3), block))
    assert [s.reason for s in caught.value.skipped] == ([] if reason is None else [reason])


def test_tokens_stay_tokens() -> None:
    model = nn.Sequential(nn.Linear(8, 16), ConvolvedTokens(16))
    with pytest.raises(NoSiteError) as caught:
        plan_se(model, example_input=torch.empty(2, 50, 8))
    assert [s.reason for s in caught.value.skipped] == [Reason.TOKENS]


def test_the_report_shows_the_axes(call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    status, out, err = call("test_one_dimension:ECGNet", "--img-size", "256")
    assert (status, err) == (0, "")
    assert "C×L" in out
    assert "32×128" in out
    assert "For one image of 12×256" in out
