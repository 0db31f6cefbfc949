"""SE with an additive bias (``shift=True``): against the formula, and wherever blocks are used."""

import json
from pathlib import Path

import pytest
import timm
import torch
from helpers import open_gates, randomize
from safetensors import safe_open
from torch import Tensor, fx, nn

from se_inject import (
    ArgumentError,
    ExportError,
    SqueezeExcite,
    inject_se,
    load_se,
    plan_se,
    save_se,
    set_plain_ops,
    to_stock,
)
from se_inject.gates import fold_se, prune_se, record_gates
from se_inject.keep.formats.fold import fold_gates
from se_inject.layers.layout import Layout

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
GATES = {
    "sigmoid": lambda z: 2 / (1 + torch.exp(-z)),
    "tanh": lambda z: 1 + torch.tanh(z),
    "relu": lambda z: (1 + z).clamp(min=0),
    "hard_sigmoid": lambda z: (z + 3).clamp(0, 6) / 3,
}


def base() -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model("test_resnet", num_classes=4)).eval()


def formula(block: SqueezeExcite, x: Tensor, gate: str) -> Tensor:
    """``x * s + shift`` in float64, for maps [N, C, *space]."""
    w1, b1, w2, b2 = (p.detach().double() for p in block.parameters())
    w1, w2 = w1.flatten(1), w2.flatten(1)
    x = x.double()
    z = torch.relu(x.flatten(2).mean(2) @ w1.T + b1) @ w2.T + b2
    c = x.shape[1]
    shape = (*x.shape[:2], *(1,) * (x.dim() - 2))
    return x * GATES[gate](z[:, :c]).reshape(shape) + z[:, c:].reshape(shape)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_the_formula(gate: str, rank: int) -> None:
    torch.manual_seed(0)
    block = SqueezeExcite(8, 4, layout=Layout(rank, 1), gate=gate, shift=True).double()
    open_gates(nn.ModuleDict({"se": block}))
    x, shortcut = torch.randn(2, 2, 8, *(5, 4, 3)[: rank - 2], dtype=torch.float64)
    expected = formula(block, x, gate)
    torch.testing.assert_close(block(x), expected)
    for plain in (False, True):
        block.set_plain(plain)
        for flags in ({}, {"residual_first": True}, {"in_place": True}):
            with torch.no_grad():
                total = block(x.clone(), shortcut.clone(), **flags)
            torch.testing.assert_close(total, expected + shortcut)


def test_channels_last_and_positions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 4)
    first = SqueezeExcite(8, 4, shift=True, squeeze="none")
    last = SqueezeExcite(8, 4, layout=Layout(4, 3), shift=True, squeeze="none")
    open_gates(nn.ModuleDict({"se": first}))
    for a, b in zip(last.parameters(), first.parameters(), strict=True):
        a.data.copy_(b.data.reshape(a.shape))
    torch.testing.assert_close(last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), first(x))


@pytest.mark.parametrize("placement", ["standard", "pre", "post", "identity", "3x3"])
@pytest.mark.parametrize("plain", [False, True])
def test_it_begins_as_the_identity(placement: str, plain: bool) -> None:
    model = base()
    before, before_in_train = model(X), base().train()(X)
    inject_se(model, example_input=X, placement=placement, shift=True)
    set_plain_ops(model, plain)
    assert torch.equal(model(X), before)
    with torch.no_grad():
        assert torch.equal(model(X), before)
    assert torch.equal(model.train()(X), before_in_train)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_begins_as_the_identity_in_short_floats(dtype: torch.dtype) -> None:
    block = SqueezeExcite(8, 4, shift=True, dtype=dtype)
    x, shortcut = torch.randn(2, 2, 8, 5, 4).to(dtype)
    assert torch.equal(block(x), x)
    assert torch.equal(block(x, shortcut), x + shortcut)


def test_gate_and_shift_learn_from_the_first_step() -> None:
    model = inject_se(base(), example_input=X, shift=True).train()
    model(X).square().sum().backward()
    for block in model.modules():
        if isinstance(block, SqueezeExcite):
            of_gate, of_shift = block.fc2.bias.grad.chunk(2)
            assert of_gate.any()
            assert of_shift.any()


def opened() -> nn.Module:
    model = inject_se(base(), example_input=X, shift=True)
    open_gates(model)
    return model


def test_with_hooks_and_in_one_pass_the_outputs_are_the_same() -> None:
    model = opened()
    fused = model(X)
    seen = []
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.register_forward_hook(
                lambda m, x, y: seen.append((formula(m, x[0], "sigmoid") - y).detach())
            )
    torch.testing.assert_close(model(X), fused)
    assert max(float(error.abs().max()) for error in seen) < 1e-4


def test_gradients_are_those_of_the_plain_operations() -> None:
    block = SqueezeExcite(4, 4, shift=True, dtype=torch.float64)
    open_gates(nn.ModuleDict({"se": block}))
    maps = torch.randn(2, 1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: block(m[0], m[1]), maps)


def test_a_file_says_it(tmp_path: Path) -> None:
    model = opened()
    save_se(model, tmp_path / "se.safetensors")
    with safe_open(tmp_path / "se.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["se_inject"])
    assert header["format"] == 4
    assert all(site["settings"]["shift"] is True for site in header["sites"])
    again = load_se(base(), tmp_path / "se.safetensors")
    assert torch.equal(again(X), model(X))
    plain = inject_se(base(), example_input=X)
    save_se(plain, tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["se_inject"])
    assert header["format"] == 3
    assert not any("shift" in site["settings"] for site in header["sites"])


def test_the_report_counts_it() -> None:
    plan, plain = (plan_se(base(), shift=shift) for shift in (True, False))
    for with_shift, without in zip(plan.sites, plain.sites, strict=True):
        c, rd = without.channels, without.bottleneck
        assert with_shift.params == without.params + c * rd + c
        assert with_shift.macs == without.macs + c * rd
    model = base()
    before = sum(p.numel() for p in model.parameters())
    inject_se(model, shift=True)
    assert sum(p.numel() for p in model.parameters()) == before + plan.added.params


def test_the_recorded_gate_is_the_gate_alone() -> None:
    model = opened()
    watched = {}
    for name, module in model.named_modules():
        if name.endswith(".se.gate"):
            module.register_forward_hook(
                lambda m, x, y, name=name: watched.__setitem__(name, y.flatten(1))
            )
    with record_gates(model) as gates:
        model(X)
    assert len(gates) == len(watched) > 0
    assert all(torch.equal(gate, watched[f"{name}.se.gate"]) for name, gate in gates.items())


def test_it_is_not_folded_pruned_or_stock() -> None:
    model = opened()
    reason = "it adds a shift behind its gate, which no layer before it can take"
    for folding in (fold_se(model, [X], tolerance=9), prune_se(model, [X], max_change=9)):
        assert folding.folded == ()
        assert set(folding.kept.values()) == {reason}
    with pytest.raises(ExportError, match="adds a shift behind its gate"):
        fold_gates(model)
    with pytest.raises(ExportError, match="no network of timm has SE blocks with shift=True"):
        to_stock(model)


def test_a_bad_value_is_named() -> None:
    with pytest.raises(ArgumentError, match="shift=1 is neither True nor False"):
        plan_se(base(), shift=1)
    with pytest.raises(ArgumentError, match="shift=True is of the SE block, which se_layer"):
        plan_se(base(), shift=True, se_layer=nn.Identity)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_it_is_scripted_and_traced() -> None:
    block = SqueezeExcite(8, 4, shift=True).eval()
    open_gates(nn.ModuleDict({"se": block}))
    x, shortcut = torch.randn(2, 2, 8, 5, 4)
    expected = block(x, shortcut)
    torch.testing.assert_close(torch.jit.script(block)(x, shortcut), expected)
    torch.testing.assert_close(fx.symbolic_trace(nn.Sequential(block))(x), block(x))
