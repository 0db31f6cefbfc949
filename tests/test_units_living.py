"""Networks with SE blocks on their units live on as their bases do: sliced, folded, exported."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import open_gates, randomize
from processes import ended
from timm.models import checkpoint_seq
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.densenet import DenseNet
from timm.models.vgg import VGG
from torch import Tensor, nn

from se_inject import (
    CheckpointError,
    ExportError,
    SqueezeExcite,
    inject_se,
    load_se,
    plan_se,
    remove_se,
    save_se,
    to_stock,
)
from se_inject.keep.formats.onnx import write_onnx
from se_inject.keep.formats.program import write_torch_export

X = torch.randn(2, 3, 64, 64)


def base(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    if name == "small densenet":  # densenet121 takes minutes where a compiler has to go through it
        net = DenseNet(growth_rate=16, block_config=(2, 2), num_classes=10)
        return randomize(net).eval()
    if name == "small vgg":
        net = VGG([16, "M", 32], num_classes=10, norm_layer=nn.BatchNorm2d, mlp_ratio=1 / 32)
        return randomize(net).eval()
    if name == "small repvgg":
        blocks = [ByoBlockCfg(type="rep", d=2, c=c, s=2, gs=0) for c in (32, 48)]
        cfg = ByoModelCfg(blocks=tuple(blocks), stem_type="rep", stem_chs=16)
        return randomize(ByobNet(cfg, num_classes=10)).eval()
    if name == "vgg11_bn" and "features_only" not in kwargs:
        kwargs["mlp_ratio"] = 1 / 32  # the classifier has 119 million weights, and no unit
    return randomize(timm.create_model(name, num_classes=10, **kwargs)).eval()


def opened(name: str, **kwargs: Any) -> nn.Module:
    model = inject_se(base(name, **kwargs), example_input=X)
    torch.manual_seed(1)
    open_gates(model)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


# --- what others do with a network ----------------------------------------------------------------


def test_a_sliced_vgg_is_the_sum_of_its_parts() -> None:
    model = opened("vgg11_bn")
    features = model.features
    assert [type(m).__name__ for m in features[:3]] == ["Conv2d", "BatchNorm2d", "SEReLU"]
    with torch.no_grad():
        parts = features[8:](features[:8](X))
        assert torch.equal(parts, features(X))
        assert not torch.equal(parts, base("vgg11_bn").features(X))


@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121", "repvgg_a0", "vovnet39a"])
def test_forward_intermediates(name: str) -> None:
    model = opened(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(X)
        assert torch.equal(model.forward_head(final), model(X))
    assert len(maps) == len(base(name).forward_intermediates(X)[1])


@pytest.mark.parametrize("name", ["vgg11_bn", "mobilenetv1_100", "repvgg_a0"])
def test_gradient_checkpointing(name: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        plain = base(name)
        for module in plain.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the base cannot be checkpointed otherwise either
        model = inject_se(plain, example_input=X)
        torch.manual_seed(1)
        open_gates(model)
        if checkpointed and name == "vgg11_bn":
            out = model.forward_head(checkpoint_seq(model.features, X))
        else:
            model.set_grad_checkpointing(checkpointed)
            out = model(X)
        out.square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if ".se" in n])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg11_bn", "densenet121", "inception_v4"])
def test_features_only(name: str) -> None:
    x = torch.randn(1, 3, 96, 96)
    plain = base(name, features_only=True)
    with torch.no_grad():
        before = plain(x)
        model = inject_se(plain, example_input=x)
        after = model(x)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"])
def test_folding_after_the_injection(name: str) -> None:
    from timm.utils import reparameterize_model

    # In float64: how far the folded float32 weights round depends on the machine.
    model = opened(name).double()
    folded = reparameterize_model(copy.deepcopy(model))
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        before, after = model(X.double()), folded(X.double())
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    keys = [key for key in model.state_dict() if ".se.fc1.weight" in key]
    assert keys == [key for key in folded.state_dict() if ".se.fc1.weight" in key]


@pytest.mark.parametrize("name", ["vgg11_bn", "small repvgg", "small densenet"])
def test_compiled_as_one_graph(name: str) -> None:
    model = opened(name)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(torch.cat([X, X])), model(torch.cat([X, X])))


@pytest.mark.parametrize("name", ["small vgg", "small densenet", "torchvision shufflenet"])
def test_exports(name: str, tmp_path: Path) -> None:
    if name.startswith("torchvision"):
        from torchvision.models import ShuffleNetV2

        # Units with and without a stride; the network of the paper has sixteen.
        net = ShuffleNetV2([2, 1, 1], [24, 48, 96, 192, 256], num_classes=10)
        model = inject_se(net.eval(), example_input=X)
        open_gates(model)
    else:
        model = opened(name)
    write_torch_export(model, tmp_path / "net.pt2")  # which compares the outputs
    assert torch.allclose(
        torch.export.load(tmp_path / "net.pt2").module()(X), output(model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["small vgg", "small densenet"])
def test_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    write_onnx(opened(name), tmp_path / "net.onnx")  # which compares the outputs
    assert (tmp_path / "net.onnx").stat().st_size > 0


def test_no_stock_network_has_them() -> None:
    with pytest.raises(ExportError, match="timm has no network like vgg11_bn"):
        to_stock(opened("vgg11_bn"))


UNPICKLE = """
import sys, torch
for file in sys.argv[1:]:
    model, x, expected = torch.load(file, weights_only=False)
    assert torch.equal(model(x), expected)
    print(*sorted({type(m).__name__ for m in model.modules() if hasattr(type(m), "_se_inject")}))
"""


def test_a_pickle_in_another_process(tmp_path: Path) -> None:
    edited = {"vgg11_bn": "SEReLU", "small densenet": "SEDenseLayer"}
    files = []
    for name in edited:
        model = opened(name)
        files.append(str(tmp_path / f"{name}.pt"))
        with torch.no_grad():
            torch.save((model, X, model(X)), files[-1])
        assert torch.equal(output(pickle.loads(pickle.dumps(model))), output(model))
    result = ended(UNPICKLE, *files)
    assert result.stdout.split() == [*edited.values()], result.stderr


# --- what is changed later --------------------------------------------------------------------


def activations(model: nn.Module) -> list[nn.ReLU]:
    return [module for module in model.modules() if isinstance(module, nn.ReLU)]


@pytest.mark.parametrize("start", [False, True])
def test_inplace_can_be_changed_after_the_injection(start: bool) -> None:
    """As on the base: the activation writes into its input, or leaves it as it was."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(start), nn.Conv2d(16, 8, 1))
    model = inject_se(net, example_input=X)
    x = torch.randn(1, 16, 4, 4)
    for inplace in (start, not start):
        model[1].inplace = inplace
        given = x.clone()
        with torch.no_grad():
            model[1](given)
        assert torch.equal(given, x.clamp(min=0) if inplace else x)


def test_checkpointing_after_inplace_was_taken_off() -> None:
    model = opened("vgg11_bn")
    for module in activations(model):
        module.inplace = False
    gradients = []
    for run in (lambda x: model.features(x), lambda x: checkpoint_seq(model.features, x)):
        model.zero_grad()
        run(X).square().sum().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if ".se" in n])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_norm_with_an_activation_keeps_its_own_attributes() -> None:
    """MobileNet's units end in ``BatchNormAct2d``, whose momentum a recipe sets after injection."""
    base_net, model = base("mobilenetv1_100"), inject_se(base("mobilenetv1_100"), example_input=X)
    statistics = []
    for net in (base_net, model):
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.5
        with torch.no_grad():
            net.train()(X)
        statistics.append([b for n, b in net.named_buffers() if "running" in n])
    assert all(map(torch.equal, *statistics))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_scripted_as_the_base() -> None:
    model = opened("vgg11_bn")
    # Scripted layers are convolutions, which round otherwise than matrix products.
    torch.testing.assert_close(output(torch.jit.script(model)), output(model))


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11_bn", "small densenet", "repvgg_a0"])
def test_a_file_of_the_se_blocks(name: str, tmp_path: Path) -> None:
    path = tmp_path / "se.safetensors"
    model = opened(name)
    save_se(model, path)
    assert torch.equal(output(load_se(base(name), path)), output(model))


def test_two_injections_come_back(tmp_path: Path) -> None:
    """The second plan sees the network as it was: a unit beside one that has its SE block."""
    model = inject_se(base("vgg11_bn"), 4, include="features.2", example_input=X)
    inject_se(model, 16, exclude="features.2", example_input=X)
    assert len([m for m in model.modules() if type(m).__name__ == "SEReLU"]) == 8
    open_gates(model)
    save_se(model, tmp_path / "se.safetensors")
    again = load_se(base("vgg11_bn"), tmp_path / "se.safetensors")
    assert torch.equal(output(again), output(model))
    remove_se(model)
    assert torch.equal(output(model), output(base("vgg11_bn")))


def test_units_in_a_file_are_found_by_the_same_where(tmp_path: Path) -> None:
    """Files of formats 1 and 2 say nothing of it: they are of residual branches."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "se.safetensors"
    save_se(opened("vgg11_bn"), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["se_inject"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert header["format"] == 3
    assert {site["settings"]["where"] for site in header["sites"]} == {"auto"}
    header["format"] = 2
    for site in header["sites"]:
        del site["settings"]["where"]
    save_file(tensors, path, metadata={"se_inject": json.dumps(header)})
    with pytest.raises(CheckpointError, match="adds no two maps"):
        load_se(base("vgg11_bn"), path)


def test_a_plan_says_what_each_site_is() -> None:
    data = plan_se(base("vgg11_bn"), example_input=X).to_dict()
    assert data["where"] == "auto"
    assert {site["kind"] for site in data["sites"]} == {"unit"}
    json.dumps(data)


# --- pitfalls that were met -----------------------------------------------------------------------


def test_memory_efficient_dense_layers_are_served_in_their_block() -> None:
    """Such a layer chooses its way by what is given to it, so that it cannot be traced alone."""
    from torchvision.models import DenseNet as TorchvisionDenseNet

    def build() -> nn.Module:
        torch.manual_seed(0)
        net = TorchvisionDenseNet(16, (2, 2), 16, num_classes=10, memory_efficient=True)
        return randomize(net).eval()

    model = inject_se(build(), example_input=X)
    names = [name for name, module in model.named_modules() if type(module) is SqueezeExcite]
    assert names == [
        f"features.denseblock{block}.{child}" for block in (1, 2) for child in ("se", "se2")
    ]
    assert torch.equal(output(model), output(build()))
    open_gates(model)
    model.train()(X).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".se" in name)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_auxiliary_heads_get_nothing() -> None:
    from torchvision.models import googlenet

    net = googlenet(num_classes=10, init_weights=True)
    assert net.aux_logits
    assert not [site.block for site in plan_se(net.eval()).sites if "aux" in site.block]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_where_lists_are_concatenated() -> None:
    model = opened("small densenet")
    traced = torch.jit.trace(model, X)
    assert torch.equal(output(traced), output(model))
