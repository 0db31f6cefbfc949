"""Networks without residual additions: where the SE blocks go, and that nothing else changes."""

from collections import Counter
from typing import Any

import pytest
import torch
from bn_inception import BNInception
from helpers import open_gates
from paper_units import rows_of_table_2, rows_of_table_3
from torch import Tensor, nn

from se_inject import inject_se, plan_se, remove_se, se_parameters
from se_inject.models.names import load_model
from se_inject.reasons import Reason

# Sites, least and most channels, added parameters (r=16, divisor 8, biases), gated units.
DEFAULTS = {
    "torchvision/vgg16_bn": (13, 64, 512, 231_824, 0),
    "torchvision/alexnet": (5, 64, 384, 43_216, 0),
    "mobilenetv1_100": (14, 32, 1024, 487_136, 0),
    "lcnet_100": (12, 16, 256, 58_176, 2),
    "repvgg_b0": (28, 64, 1280, 360_168, 0),
    "mobileone_s1": (22, 64, 1280, 594_472, 0),
    "torchvision/squeezenet1_1": (8, 128, 512, 125_600, 0),
    "torchvision/googlenet": (9, 256, 1024, 494_288, 0),
    "inception_v3": (11, 256, 2048, 1_659_312, 0),
    "inception_v4": (19, 96, 1536, 2_333_160, 0),
    "densenet121": (58, 32, 32, 32_016, 0),
    "rdnet_tiny": (6, 64, 104, 8_616, 15),
    "torchvision/shufflenet_v2_x1_0": (16, 58, 232, 50_504, 0),
    "selecsls60": (9, 64, 416, 66_136, 0),
    "vovnet39a": (6, 256, 1024, 455_184, 0),
}


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize("name", DEFAULTS)
def test_the_table_of_defaults(name: str) -> None:
    plan = plan_se(load_model(name, meta=True))
    channels = [site.channels for site in plan.sites]
    gated = sum(entry.reason == Reason.UNIT_GATED for entry in plan.skipped)
    found = (len(channels), min(channels), max(channels), plan.added.params, gated)
    assert found == DEFAULTS[name]
    assert {site.kind for site in plan.sites} == {"unit"}


@pytest.mark.parametrize(
    ("name", "residual", "units", "params"),
    [
        ("inception_resnet_v2", 40, 3, 9_368_784),
        ("pnasnet5large", 0, 14, 12_379_546),
        ("nasnetalarge", 0, 23, 17_466_836),
        ("resnet18", 8, 0, None),
        ("ghostnet_100", 9, 0, None),
    ],
)
def test_units_beside_residual_branches(
    name: str, residual: int, units: int, params: int | None
) -> None:
    plan = plan_se(load_model(name, meta=True), where="units")
    kinds = Counter(site.kind for site in plan.sites)
    assert (kinds["residual"], kinds["unit"]) == (residual, units)
    assert params in (None, plan.added.params)


# --- the same function, the same keys, all of it undone -------------------------------------------

# One small model of every family, and the side of its images.
FAMILIES = {
    "torchvision/vgg11_bn": 64,
    "torchvision/alexnet": 96,
    "mobilenetv1_100": 64,
    "lcnet_050": 64,
    "repvgg_a0": 64,
    "mobileone_s1": 64,
    "torchvision/squeezenet1_1": 64,
    "torchvision/googlenet": 64,
    "inception_v3": 96,
    "inception_v4": 96,
    "densenet121": 64,
    "torchvision/densenet121": 64,
    "rdnet_tiny": 64,
    "torchvision/shufflenet_v2_x0_5": 64,
    "selecsls42": 64,
    "vovnet39a": 64,
}
OTHERS = pytest.mark.filterwarnings(
    "ignore:The default weight initialization:FutureWarning",
    "ignore:Initializing zero-element:UserWarning",
)


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    kwargs: dict[str, Any] = {"init_weights": True} if "googlenet" in name else {}
    if "googlenet" in name:
        from torchvision.models import googlenet

        return googlenet(num_classes=10, aux_logits=False, **kwargs).eval()
    model = load_model(name, num_classes=10).eval()
    if "vgg" in name:  # its own classifier has 119 million weights, and no unit
        model.classifier = nn.Linear(512 * 7 * 7, 10)
    return model


def run(model: nn.Module, x: Tensor, *, training: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the buffers after it (of batch norms)."""
    torch.manual_seed(1)
    model.train(training)
    with torch.no_grad():
        out = model(x.clone())
    model.eval()
    return out, {key: value.clone() for key, value in model.named_buffers()}


@OTHERS
@pytest.mark.parametrize("name", ["vgg13_bn", "repvgg_a0", "torchvision/alexnet"])
def test_an_activation_that_is_a_unit_by_itself_is_edited_on_meta(name: str) -> None:
    """It has no tensors: the check before the edit must not take it for one on the CPU."""
    model = load_model(name, meta=True)
    inject_se(model)
    assert all(p.is_meta for p in se_parameters(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_function_keys_gradients_and_removal(name: str) -> None:
    model = built(name)
    side = FAMILIES[name]
    x = torch.randn(2, 3, side, side)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    before = {mode: run(model, x, training=mode) for mode in (False, True)}
    model.load_state_dict(state)

    inject_se(model, example_input=x)
    assert [key for key in model.state_dict() if key in state] == list(state)
    for mode, (expected, buffers) in before.items():
        out, after = run(model, x, training=mode)
        assert torch.equal(out, expected)
        assert all(torch.equal(after[key], value) for key, value in buffers.items())
    parameters = list(se_parameters(model))
    # fc2 is zero at the start: fc1 learns from the second step on.
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in parameters)
    model.eval()
    open_gates(model)
    assert not torch.equal(run(model, x, training=False)[0], before[False][0])

    remove_se(model)
    model.load_state_dict(state)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert torch.equal(run(model, x, training=False)[0], before[False][0])


# --- the paper ------------------------------------------------------------------------------------


def test_table_2_of_the_paper() -> None:
    vgg, inception = rows_of_table_2()
    assert vgg[1:6] == ("13", "15.47 → 15.48", "15.4703", "15.4840", "15.4976")
    assert inception[1:6] == ("10", "2.03 → 2.04", "2.0326", "2.0344", "2.0356")


def test_the_authors_bn_inception_has_as_many_parameters_in_its_se_blocks() -> None:
    plan = plan_se(BNInception(), divisor=1, example_input=torch.empty(1, 3, 224, 224))
    assert plan.added.params == 639_360 + 7_038


def test_table_3_of_the_paper() -> None:
    mobilenet, with_stem, shufflenet = rows_of_table_3()
    assert mobilenet[1::2] == ("13", "4.232 → 4.712", "568.74", "574.64")
    assert mobilenet[6] == "571.93"
    assert with_stem[6] == "572.33"
    assert shufflenet[1::2] == ("16", "1.866 → 2.477", "137.46", "141.28")
    assert shufflenet[6] == "139.68"
