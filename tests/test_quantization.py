"""Quantization of an injected network: FX goes through it, eager mode says why it cannot."""

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as q
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torchvision.models.quantization.mobilenetv3 import QuantizableInvertedResidual
from torchvision.models.quantization.resnet import QuantizableBasicBlock, QuantizableResNet

from se_inject import NoSiteError, UnsupportedModelError, inject_se, plan_se, remove_se

X = torch.randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this part of torch is being moved to torchao
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return QuantizableResNet(QuantizableBasicBlock, [1, 1, 1, 1], num_classes=10).eval()


def eager(model: nn.Module, *, qat: bool = False) -> nn.Module:
    model.train(qat)
    model.fuse_model(is_qat=qat)
    engine = torch.backends.quantized.engine
    model.qconfig = (q.get_default_qat_qconfig if qat else q.get_default_qconfig)(engine)
    (q.prepare_qat if qat else q.prepare)(model, inplace=True)
    model(X)
    return q.convert(model.eval(), inplace=True)


@pytest.mark.parametrize("qat", [False, True])
def test_eager_quantization_is_refused_at_prepare(qat: bool) -> None:
    model = inject_se(network(), example_input=X)
    with pytest.raises(UnsupportedModelError, match=r"eager quantization .*BasicBlock"):
        eager(model, qat=qat)


def test_eager_quantization_works_once_the_se_blocks_are_removed() -> None:
    base = network()
    model = remove_se(inject_se(copy.deepcopy(base), example_input=X))
    assert torch.equal(eager(model)(X), eager(base)(X))


def test_a_block_may_be_left_out_of_eager_quantization() -> None:
    model = inject_se(network(), example_input=X)
    for module in model.modules():
        if type(module).__name__ == "SEQuantizableBasicBlock":
            module.qconfig = None
            assert module.qconfig is None
            del module.qconfig
            assert not hasattr(module, "qconfig")


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_fx_quantization_goes_through_an_injected_quantizable_network() -> None:
    base = network()
    model = inject_se(copy.deepcopy(base), example_input=X)
    for module in model.modules():
        if hasattr(module, "fc2"):
            nn.init.normal_(module.fc2.weight, std=0.5)
    errors = []
    for net in (base, model):
        prepared = prepare_fx(copy.deepcopy(net), q.get_default_qconfig_mapping(), (X,))
        prepared(X)
        errors.append(relative(convert_fx(prepared)(X), net(X)))
    assert errors[1] < max(0.2, 3 * errors[0])
    assert relative(base(X), model(X)) > errors[1]  # the gates are in it


def test_a_float_functional_is_an_addition_like_any_other() -> None:
    plan = plan_se(network(), example_input=X)
    assert [site.block for site in plan.sites] == [f"layer{i}.0" for i in (1, 2, 3, 4)]
    text = inject_se(network(), example_input=X).layer1[0].forward.__func__.__code__.co_names
    assert "activation_post_process" not in text


def test_a_network_that_is_prepared_already_is_not_injected() -> None:
    model = network()
    model.qconfig = q.get_default_qconfig(torch.backends.quantized.engine)
    q.prepare(model, inplace=True)
    with pytest.raises(NoSiteError, match="prepared for eager quantization; inject first"):
        plan_se(model, example_input=X)


def test_the_gate_of_a_quantizable_mobilenet_is_seen() -> None:
    from torchvision.models.mobilenetv3 import InvertedResidualConfig

    config = InvertedResidualConfig(16, 3, 16, 16, True, "RE", 1, 1, 1)
    block = QuantizableInvertedResidual(config, nn.BatchNorm2d)
    with pytest.raises(NoSiteError, match="already has channel attention"):
        plan_se(nn.Sequential(nn.Conv2d(3, 16, 1), block), example_input=X)
