"""Hooks on SE blocks see what they see on timm's: branch x gate, and the gate by itself."""

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from helpers import open_gates, randomize
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from se_inject import SqueezeExcite, inject_se, se_parameters

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """timm's own seresnet18, and resnet18 with our SE blocks and the same weights."""
    theirs = randomize(timm.create_model("seresnet18", num_classes=5)).eval()
    ours = inject_se(timm.create_model("resnet18", num_classes=5), init="paper", example_input=X)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs


def seen(model: nn.Module, name: str, x: Tensor = X) -> Tensor:
    """What a forward hook on a module is given, copied before the model changes it in place."""
    kept: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, output: kept.append(output.clone())
    )
    model(x)
    handle.remove()
    (output,) = kept
    return output


@pytest.mark.parametrize("name", ["layer1.0.se", "layer4.1.se", "layer4.1.se.gate"])
def test_a_forward_hook_sees_what_it_sees_on_timms_block(
    pair: tuple[nn.Module, nn.Module], name: str
) -> None:
    ours, theirs = (seen(model, name) for model in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_output_with_hooks_differs_by_one_rounding_and_without_them_not_at_all(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    model = pair[0]
    before = model(X)
    handles = [
        module.register_forward_hook(lambda *_: None)
        for module in model.modules()
        if isinstance(module, SqueezeExcite)
    ]
    watched = model(X)
    torch.testing.assert_close(watched, before, rtol=1e-5, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [timm.create_model, torchvision.models.get_model])
def test_with_hooks_an_injected_model_starts_at_the_same_bits(build: Any, dtype: Any) -> None:
    model = randomize(build("resnet18")).to(dtype).eval()
    x = X.to(dtype)
    expected = model(x)
    inject_se(model, example_input=x)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            module.register_forward_hook(lambda *_: None)
            module.gate.register_forward_hook(lambda *_: None)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("gate", ["sigmoid", "tanh", "relu", "hard_sigmoid"])
def test_the_gate_that_a_hook_sees_is_what_the_branch_is_multiplied_by(gate: Any) -> None:
    se = SqueezeExcite(16, 8, gate=gate)
    nn.init.normal_(se.fc2.weight)
    x, residual = torch.randn(2, 2, 16, 5, 5).unbind()
    expected = se(x, residual)
    kept: list[Tensor] = []
    se.gate.register_forward_hook(lambda module, args, output: kept.append(output))
    assert torch.equal(se(x, residual), expected)  # The factor is a power of two.
    assert kept[0].shape == (2, 16, 1, 1)
    assert torch.equal(se(x), x * kept[0])


def test_a_hook_may_replace_the_gate_and_the_output_of_the_block() -> None:
    se = SqueezeExcite(16, 8)
    x, residual = torch.randn(2, 2, 16, 5, 5).unbind()
    handle = se.gate.register_forward_hook(lambda *_: torch.zeros(2, 16, 1, 1))
    assert torch.equal(se(x, residual), residual)
    handle.remove()
    se.register_forward_hook(lambda *_: torch.zeros_like(x))
    assert torch.equal(se(x, residual, in_place=True), residual)


def test_what_a_hook_keeps_is_not_changed_afterwards() -> None:
    """The sum replaces ``x += residual``, which would be written to the map that the hook holds."""
    se = SqueezeExcite(16, 8)
    kept: list[Tensor] = []
    se.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.inference_mode():
        x, residual = torch.randn(2, 2, 16, 5, 5).unbind()
        total = se(x.clone(), residual, in_place=True)
    assert torch.equal(kept[0], x)
    assert torch.equal(total, x + residual)


def test_hooks_on_all_modules_and_of_the_backward_pass_count_too() -> None:
    se = SqueezeExcite(16, 8)
    x, residual = torch.randn(2, 2, 16, 5, 5).unbind()
    arguments: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: (
            arguments.append(len(args)) if module is se else None  # type: ignore[func-returns-value]
        )
    )
    se(x, residual)
    handle.remove()
    gradients: list[Tensor] = []
    se.register_full_backward_hook(lambda module, inputs, outputs: gradients.append(inputs[0]))
    se(x.requires_grad_(), residual, in_place=True).sum().backward()
    assert arguments == [1]
    assert torch.equal(gradients[0], torch.ones_like(x))


def test_a_sum_in_place_keeps_its_dtype_under_hooks() -> None:
    se = SqueezeExcite(16, 8, dtype=torch.bfloat16)
    x, residual = torch.randn(2, 16, 5, 5).to(torch.bfloat16), torch.randn(2, 16, 5, 5)
    expected = se(x, residual, in_place=True)
    se.register_forward_hook(lambda *_: None)
    assert se(x, residual, in_place=True).dtype == expected.dtype == torch.bfloat16


def test_hooks_go_along_with_a_copy() -> None:
    se = SqueezeExcite(16, 8)
    se.gate.register_forward_hook(lambda *_: torch.zeros(2, 16, 1, 1))
    x = torch.randn(2, 16, 5, 5)
    assert not copy.deepcopy(se)(x).any()


def test_the_gate_adds_no_key_and_no_parameter() -> None:
    model = inject_se(timm.create_model("test_resnet"))
    assert not [key for key in model.state_dict() if ".gate" in key]
    gates = [name for name, _ in model.named_modules() if name.endswith("se.gate")]
    assert gates
    assert len([*se_parameters(model)]) == 4 * len(gates)


def test_features_by_name_are_those_of_timms_block() -> None:
    """torchvision's extractor and timm's, by the names of the modules."""
    model = inject_se(randomize(torchvision.models.resnet18()).eval(), example_input=X)
    open_gates(model)
    names = ["layer1.0.se", "layer3.1.se.gate", "layer4.1.se"]
    features = create_feature_extractor(model, names)(X)
    for name in names:
        torch.testing.assert_close(features[name], seen(model, name), rtol=1e-5, atol=1e-5)
