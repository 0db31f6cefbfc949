"""``optimize_for_inference``: fewer operations, equal outputs; what is not proven stays."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import command
from helpers import open_gates, randomize
from torch import Tensor, nn

import se_inject.keep.deploy.optimize
from se_inject import (
    ForwardError,
    SqueezeExcite,
    UnsupportedModelError,
    inject_se,
    optimize_for_inference,
    save_se,
    set_plain_ops,
)
from se_inject.keep.deploy.optimize import Optimization, optimized_copy
from se_inject.keep.formats import FORMATS
from se_inject.layers.deployed import DeployedSE

X = torch.randn(2, 3, 32, 32)


def opened(model: nn.Module, **options: Any) -> nn.Module:
    """With SE blocks whose gates depend on the image, and norms that show a mistake."""
    torch.manual_seed(0)
    options = {"example_input": X, "r": 4, "divisor": 1, **options}
    open_gates(inject_se(randomize(model).eval(), **options))
    return model


@torch.no_grad()
def optimized(model: nn.Module, x: Tensor = X) -> tuple[nn.Module, Optimization]:
    """The copy, after a look at its outputs on other images, and at what it left alone."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    fast, done = optimized_copy(model, example_input=x)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not any(module.training for module in fast.modules())
    other = torch.randn(3, *x.shape[1:])
    assert far(fast(other), copy.deepcopy(model).eval()(other)) < 1e-5
    assert done.change < 1e-5
    return fast, done


def far(a: Any, b: Any) -> float:
    a, b = (t[0] if isinstance(t, tuple) else t for t in (a, b))
    return float((a - b).abs().max() / b.abs().max())


# --- networks of timm ----------------------------------------------------------------------------


def resnet(block: type[nn.Module]) -> nn.Module:
    """A narrow ResNet of timm with one block in each stage."""
    return timm.models.resnet.ResNet(block, (1, 1, 1, 1), num_classes=10, channels=(8, 16, 24, 32))


def bottlenecks() -> nn.Module:
    return resnet(timm.models.resnet.Bottleneck)


# Norms folded, SE blocks, and how many of those squeeze before a 1x1 convolution.
NETWORKS = {
    "bottlenecks": (bottlenecks, 17, 4, 4),
    "basic blocks": (lambda: resnet(timm.models.resnet.BasicBlock), 13, 4, 0),  # 3x3 ends them
    "test_resnet": (lambda: timm.create_model("test_resnet"), 15, 4, 1),
    # A 1x1 convolution from many channels to few ends its branches.
    "mobilenetv2_035": (lambda: timm.create_model("mobilenetv2_035"), 52, 10, 0),
    # Units, which end in an activation.
    "mobilenetv1_100": (lambda: timm.create_model("mobilenetv1_100"), 26, 12, 0),
    # Layer norms depend on the image.
    "test_convnext": (lambda: timm.create_model("test_convnext"), 0, 9, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_give_the_same_outputs(name: str) -> None:
    build, norms, blocks, early = NETWORKS[name]
    model = opened(build()).train()
    fast, done = optimized(model)
    assert model.training
    assert (len(done.norms), len(done.products), len(done.early)) == (norms, blocks, early)
    assert done.kept == done.constant == ()
    again, nothing = optimized_copy(fast)
    assert str(nothing) == "Found nothing to change. Outputs do not change."
    assert torch.equal(again(X), fast(X))


def test_a_base_is_optimised_too() -> None:
    model = randomize(bottlenecks())
    fast, done = optimized(model)
    assert len(done.norms) == 17
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert str(done).startswith("Folded 17 norms into convolutions. Outputs change by ")


def test_other_images_come_from_the_injection() -> None:
    """What the model was injected with is what it takes."""
    model = opened(
        timm.create_model("test_resnet", in_chans=5), example_input=X.new_zeros(1, 5, 64, 96)
    )
    fast = optimize_for_inference(model)
    x = torch.randn(2, 5, 64, 96)
    with torch.no_grad():
        assert far(fast(x), model(x)) < 1e-5


@torch.no_grad()
def test_what_becomes_of_a_copy() -> None:
    """It is copied, pickled, and goes over to plain operations."""
    model = opened(bottlenecks())
    fast = optimize_for_inference(model)
    assert fast.layer1[0].se.early
    assert "se_gate = self.se.excite(" in source(fast.layer1[0])
    expected = fast(X)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(X), expected)
    assert far(set_plain_ops(copy.deepcopy(fast))(X), expected) < 1e-5
    assert optimize_for_inference(set_plain_ops(model)).layer1[0].se.plain
    with torch.inference_mode():
        assert far(optimize_for_inference(model)(X), expected) < 1e-5


def source(block: nn.Module) -> str:
    import inspect

    return inspect.getsource(type(block).forward)


# --- norms ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A stem with a norm that can be folded, whatever a case makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.other = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Any:
        return self.other(torch.relu(self.bn(self.conv(x))))


class NormTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.other(self.bn(self.conv(x))))


class ConvolutionTwice(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) + self.conv(x.flip(-1))


class OthersRead(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.other(self.bn(y)) + y


class Returned(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.other(self.bn(y)), y


class KeptOnTheModule(Net):
    def forward(self, x: Tensor) -> Any:
        self.seen = self.conv(x)
        return self.other(self.bn(self.seen))


class Between(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(torch.relu_(self.conv(x)))


class ReadsWeight(Net):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.conv(x)) * self.conv.weight.sum()


class LooksAtValues(Net):
    def forward(self, x: Tensor) -> Any:
        if x[0, 0, 0, 0] > 1e9:
            return self.conv(x)
        return self.bn(self.conv(x))


def hooked(child: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Net()
        getattr(model, child).register_forward_hook(lambda module, args, output: None)
        return model

    return build


def sharing_its_weight() -> nn.Module:
    model = Net()
    model.twin = nn.Conv2d(3, 6, 3)
    model.twin.weight = model.conv.weight
    return model


def at_two_places() -> nn.Module:
    model = Net()
    model.again = model.conv
    return model


def with_another_forward() -> nn.Module:
    model = Net()
    forward = model.conv.forward
    model.conv.forward = lambda x: forward(x) + 1
    return model


def changed(child: str, module: nn.Module) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Net()
        setattr(model, child, copy.deepcopy(module))
        return model

    return build


class OwnConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


LEFT = {
    "norm twice": NormTwice,
    "convolution twice": ConvolutionTwice,
    "others read": OthersRead,
    "returned": Returned,
    "kept": KeptOnTheModule,
    "something between": Between,
    "weight is read": ReadsWeight,
    "values": LooksAtValues,
    "hook on the convolution": hooked("conv"),
    "hook on the norm": hooked("bn"),
    "shared weight": sharing_its_weight,
    "two places": at_two_places,
    "another forward": with_another_forward,
    "subclass": changed("conv", OwnConvolution(3, 6, 3)),
    "parametrised": changed("conv", nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))),
    "transposed": changed("conv", nn.ConvTranspose2d(3, 6, 3)),
    "statistics of the batch": changed("bn", nn.BatchNorm2d(6, track_running_stats=False)),
    "group norm": changed("bn", nn.GroupNorm(2, 6)),
}


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.filterwarnings("ignore")  # of weight_norm, about itself
def test_what_is_not_proven_is_left_as_it_is(case: str) -> None:
    model = randomize(LEFT[case]()).eval()
    fast, done = optimized(model)
    assert done.norms == ()
    assert torch.equal(first(fast(X)), first(model(X)))


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


FOLDED = {
    "as it is": Net,
    "grouped, strided": changed("conv", nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False)),
    "reflected padding": changed("conv", nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
    "no affine": changed("bn", nn.BatchNorm2d(6, affine=False)),
    "with an activation": changed("bn", timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)),
    "SyncBatchNorm": changed("bn", nn.SyncBatchNorm(6)),
    "padded as TensorFlow does": changed("conv", timm.layers.Conv2dSame(3, 6, 3, stride=2)),
}


@pytest.mark.parametrize("case", FOLDED)
def test_a_norm_that_alone_reads_its_convolution_is_folded(case: str) -> None:
    fast, done = optimized(randomize(FOLDED[case]()))
    assert done.norms == ("bn",)
    assert type(fast.bn) is (nn.SiLU if case == "with an activation" else nn.Identity)


def test_weights_keep_their_memory_format_and_stay_frozen() -> None:
    model = randomize(Net()).to(memory_format=torch.channels_last).requires_grad_(False)
    fast, _ = optimized(model)
    assert fast.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not fast.conv.weight.requires_grad


# --- SE blocks -----------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """8 channels, 4 in between; ``last`` is what the branch ends in."""

    def __init__(self, last: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.last = last
        self.norm = nn.BatchNorm2d(8) if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.norm(self.last(torch.relu(self.reduce(x))))


class Downsampled(Bottleneck):
    """Its last 1x1 convolution sees every second position of a map."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 8, 1, stride=2))
        self.shortcut = nn.Conv2d(8, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.shortcut(x) + self.norm(self.last(torch.relu(self.reduce(x))))


class Branch(nn.Module):
    """The whole branch is one child, as in MobileNetV2."""

    def __init__(self, *more: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        inner = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), *more)
        self.branch = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True), inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x += self.branch(x)
        return x


EARLY = {
    "1x1": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1))),
    "without bias": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1, bias=False)), bias=False),
    "in a Sequential": lambda: opened(Branch()),
    "identities behind": lambda: opened(Branch(nn.Identity(), nn.Sequential())),
    "ConvNormAct": lambda: opened(
        Bottleneck(timm.layers.ConvNormAct(4, 8, 1, apply_act=False), nn.Identity())
    ),
    "1 + tanh": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1)), gate="tanh"),
}
LATE = {
    "3x3": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 3, padding=1))),
    "grouped": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1, groups=2))),
    "padded": lambda: opened(
        Bottleneck(nn.Sequential(nn.AvgPool2d(3, 1), nn.Conv2d(4, 8, 1, padding=1)))
    ),
    "strided": lambda: opened(Downsampled()),
    "not wider": lambda: opened(
        Bottleneck(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)))
    ),
    "an activation behind": lambda: opened(Branch(nn.ReLU())),
    "hook on the convolution": lambda: with_hook(opened(Bottleneck(nn.Conv2d(4, 8, 1))), "last"),
    "hook on the norm": lambda: with_hook(opened(Bottleneck(nn.Conv2d(4, 8, 1))), "norm"),
    "hook on the branch": lambda: with_hook(opened(Branch()), "branch"),
    **{
        f"placement {placement}": lambda placement=placement: opened(
            bottlenecks(), placement=placement
        )
        for placement in ("pre", "post", "identity", "3x3")
    },
}
UNCHANGED = {
    "maximum": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1)), squeeze="max"),
    "no squeeze": lambda: opened(Bottleneck(nn.Conv2d(4, 8, 1)), squeeze="none"),
    "hook on the SE block": lambda: with_hook(opened(Bottleneck(nn.Conv2d(4, 8, 1))), "se"),
    "hook in the SE block": lambda: with_hook(opened(Bottleneck(nn.Conv2d(4, 8, 1))), "se.gate"),
    "another layer": lambda: opened(
        Bottleneck(nn.Conv2d(4, 8, 1)), se_layer=Scale, r=16, divisor=8
    ),
    "channels last": lambda: opened(timm.create_model("test_mambaout")),
}


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def with_hook(model: nn.Module, name: str) -> nn.Module:
    model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("case", EARLY)
def test_the_squeeze_comes_before_the_last_convolution(case: str) -> None:
    fast, done = optimized(EARLY[case]())
    assert done.early == done.products == ("se",)
    assert fast.se.fc1.in_features == 4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())


@pytest.mark.parametrize("case", LATE)
def test_a_mean_that_does_not_commute_stays_where_it_is(case: str) -> None:
    _, done = optimized(LATE[case]())
    assert done.early == ()
    assert done.products


@torch.no_grad()
def test_what_a_hook_sees_stays_what_it_was() -> None:
    """The factor of the gate would double the map that the hook on the branch sees."""
    seen: list[Tensor] = []
    model = opened(Branch())
    model.branch.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    fast, done = optimized_copy(model, example_input=X)
    assert done.factors == ()
    seen.clear()
    model(X)
    fast(X)
    assert far(seen[1], seen[0]) < 1e-5


@pytest.mark.parametrize("case", UNCHANGED)
def test_se_blocks_that_are_left_as_they_are(case: str) -> None:
    fast, done = optimized(UNCHANGED[case]())
    assert done.products == done.early == ()
    assert done.kept
    assert not any(isinstance(module, DeployedSE) for module in fast.modules())


@pytest.mark.parametrize("rank", [1, 3])
def test_other_maps_than_images(rank: int) -> None:
    convolution, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (nn.Conv3d, nn.BatchNorm3d)
    model = Bottleneck(convolution(4, 8, 1))
    model.stem, model.reduce = convolution(3, 8, 3, padding=1), convolution(8, 4, 1)
    model.norm = norm(8)
    x = torch.randn(2, 3, *(6,) * rank)
    _, done = optimized(opened(model, example_input=x), x)
    assert done.early == ("se",)
    assert done.norms == ("norm",)


def test_gates_that_are_constant_are_folded() -> None:
    """At the identity start every gate is 1; a bias of fc2 makes another constant of it."""
    model = inject_se(randomize(bottlenecks()).eval(), example_input=X)
    fast, done = optimized(model)
    assert len(done.constant) == 4
    assert not any(isinstance(module, SqueezeExcite) for module in fast.modules())
    with torch.no_grad():
        model.layer1[0].se.fc2.bias.normal_()
        model.layer2[0].se.fc2.weight.normal_(0, 0.3)
    _, done = optimized(model)
    assert len(done.constant) == 3
    assert done.early == ("layer2.0.se",)


def test_a_constant_that_has_nowhere_to_go_stays_a_gate() -> None:
    model = inject_se(randomize(bottlenecks()), example_input=X, placement="post")
    with torch.no_grad():
        model.layer1[0].se.fc2.bias.normal_()
    _, done = optimized(model)
    assert len(done.constant) == 3
    assert done.products == ("layer1.0.se",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_differ_by_their_own_rounding(dtype: torch.dtype) -> None:
    model = opened(bottlenecks()).to(dtype)
    fast, done = optimized_copy(model, example_input=X.to(dtype))
    assert len(done.norms) == 17
    assert fast(X.to(dtype)).dtype == dtype
    assert done.change < (1e-12 if dtype == torch.float64 else 0.1)


# --- a wrong result is never silent --------------------------------------------------------------


def test_a_copy_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: nn.Module, pairs: Any) -> list[str]:
        with torch.no_grad():
            model.get_submodule(pairs[0].convolution).weight.mul_(1 + 1e-3)
        return []

    monkeypatch.setattr(se_inject.keep.deploy.optimize, "fold_norms", spoil)
    with pytest.raises(UnsupportedModelError, match="optimised copy of Net differs from it by"):
        optimize_for_inference(randomize(Net()), example_input=X)


class AsksItsNorm(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.bn.eps


class NoTensor(Net):
    def forward(self, x: Tensor) -> str:
        return str(super().forward(x).shape)


REFUSED = {
    "attribute of a norm": (AsksItsNorm, UnsupportedModelError, "reads attributes of layers"),
    "no output": (NoTensor, UnsupportedModelError, "puts out no tensor"),
    "wrong input": (lambda: nn.Conv2d(7, 7, 3), ForwardError, "fails on the example"),
    "no model": (lambda: 3, UnsupportedModelError, "expected an nn.Module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_optimised_is_said(case: str) -> None:
    build, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        optimize_for_inference(build(), example_input=X)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_a_file_has_the_fewer_operations(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    import onnxruntime

    form = FORMATS[name]
    model = opened(Bottleneck(nn.Conv2d(4, 8, 1)))
    path = tmp_path / f"net{form.suffix}"
    hint, done = form.write_optimized(model, path)
    assert (len(done.norms), len(done.early)) == (1, 1)
    loaded = eval(hint, {"torch": torch, "onnxruntime": onnxruntime})
    x = torch.randn(3, 3, 64, 48)
    if name == "onnx":
        (got,) = loaded.run(None, {"input": x.numpy()})
        assert far(torch.from_numpy(got), model(x)) < 1e-4
    else:
        x = torch.randn(3, 3, 32, 32)
        assert far(loaded(x), model(x)) < 1e-4
        assert not any("batch_norm" in str(node.target) for node in loaded.graph.nodes)


@pytest.mark.filterwarnings("ignore")  # of torch.export, about itself
def test_the_command_says_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import se_inject.keep.restore

    model = opened(Bottleneck(nn.Conv2d(4, 8, 1)))
    monkeypatch.setattr(se_inject.keep.restore, "restore_model", lambda *_, **__: model)
    save_se(model, tmp_path / "se.safetensors")
    weights = ("test_resnet", "--weights", str(tmp_path / "se.safetensors"))
    path = tmp_path / "net.pt2"
    call = ("export", *weights, "--format", "torch-export", "--optimize", "--output", str(path))
    done = command(*call)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Folded 1 norm into convolutions; folded the factor of 1 gate;")
    said = json.loads(command(*call, "--json").stdout)
    assert said["optimized"]["early"] == ["se"]
    refused = command("export", *weights, "--optimize", "--output", str(tmp_path / "a.safetensors"))
    assert refused.returncode == 2
    assert "--optimize is for --format torch-export or onnx" in " ".join(
        refused.stderr.replace("│", " ").split()
    )


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_compares_within_each_round() -> None:
    """Our overhead is half of timm's in every round, though the machine gets slower."""
    from inference import ARMS, summarise

    times = {"base": 10.0, "timm": 12.0, "se_inject": 11.0}
    times |= {f"{name}, optimized": 0.5 * t for name, t in times.items()}
    seconds = {name: [t * slow for slow in (1.0, 2.0, 4.0)] for name, t in times.items()}
    rows = summarise(seconds, ARMS)
    for name in ("se_inject", "se_inject, optimized"):
        assert rows[name]["overhead_quartiles"] == pytest.approx([0.1] * 3)
        assert rows[name]["overhead_to_timm"] == pytest.approx(0.5)
    assert rows["se_inject, optimized"]["gain_quartiles"] == pytest.approx([0.5] * 3)
