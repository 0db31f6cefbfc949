"""Networks that need no se_inject: stock timm, torch.export, ONNX."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_net
import timm
import torch
import torchvision
from commands import command
from helpers import randomize
from torch import Tensor, nn

import se_inject.keep.formats.program
from se_inject import (
    ExportError,
    NoSiteError,
    inject_se,
    save_se,
    se_parameters,
    set_plain_ops,
    to_stock,
)
from se_inject.keep.fold import fold_gates
from se_inject.keep.formats import FORMATS
from se_inject.keep.formats.compare import check_equal
from se_inject.keep.formats.onnx import write_onnx
from se_inject.keep.formats.program import write_torch_export
from se_inject.layers.attention import Attention

X = torch.randn(2, 3, 64, 64)
SMALL = torch.randn(2, 3, 32, 32)


def after_real_steps(name: str, x: Tensor = X, **options: object) -> nn.Module:
    """Trained for three steps, and then some: gates that differ from image to image."""
    torch.manual_seed(0)
    base = randomize(timm.create_model(name, **options))  # timm's last norms are zero at first
    model = inject_se(base, example_input=x).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    labels = torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, *x.shape[1:])), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert all(p.abs().max() > 0 for p in se_parameters(model))  # fc2 has left its zero
    with torch.no_grad():
        for p in se_parameters(model):
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


STOCK = {
    "resnet18": "seresnet18",
    "resnet50": "seresnet50",
    "resnext50_32x4d": "seresnext50_32x4d",
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_after_real_steps(name: str) -> None:
    model = after_real_steps(name, SMALL, num_classes=5)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = model(SMALL)
    stock = to_stock(model)
    assert not any("se_inject" in type(module).__module__ for module in stock.modules())
    assert set(stock.state_dict()) == set(
        timm.create_model(STOCK[name], num_classes=5).state_dict()
    )
    torch.testing.assert_close(stock(SMALL), expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    # Folding itself loses no bit. What differs are the roundings of addcmul and of products.
    assert torch.equal(stock(SMALL), set_plain_ops(model)(SMALL))


def test_folding_loses_no_bit() -> None:
    """Doubling a norm's weight and halving fc1's are exact."""
    model = after_real_steps("resnet50", SMALL)
    expected = model(SMALL)
    fold_gates(model)
    assert torch.equal(model(SMALL), expected)
    assert {m.gate_scale for m in model.modules() if hasattr(m, "gate_scale")} == {1.0}


class Bare(nn.Module):
    """The SE block would read a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


class Shared(nn.Module):
    """Doubling the norm would double the second sum too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return x + y, y


class Twice(nn.Module):
    """Doubling the convolution would double its first output too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.conv(x)))


def test_a_factor_with_nowhere_to_go_is_named_and_nothing_changes() -> None:
    for block in (Bare, Shared, Twice):
        model = inject_se(nn.Sequential(nn.Conv2d(3, 3, 1), block()), 1, divisor=1, example_input=X)
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(ExportError, match=r"the SE block of '1' .* has nowhere to go"):
            fold_gates(model)
        assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def opened(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
@pytest.mark.parametrize("gate", ["sigmoid", "hard_sigmoid"])
@pytest.mark.parametrize("placement", ["standard", "3x3"])
def test_folding_a_variant_loses_no_bit(placement: Any, gate: Any, squeeze: Any) -> None:
    model = randomize(timm.create_model("resnet26"))
    options = {"placement": placement, "gate": gate, "squeeze": squeeze, "bias": False}
    opened(inject_se(model, example_input=X, **options))
    expected = model(X)
    fold_gates(model)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_bias_of_a_convolution_takes_the_factor_too(groups: int) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(x)

    model = opened(inject_se(nn.Sequential(nn.Conv2d(3, 4, 1), Block()), example_input=X, r=2))
    expected = model(X)
    fold_gates(model)
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("gate", ["tanh", "relu"])
def test_a_gate_that_is_no_multiple_of_the_papers_is_not_folded(gate: Any) -> None:
    model = inject_se(timm.create_model("resnet18"), example_input=X, gate=gate)
    with pytest.raises(ExportError, match=rf"no multiple of {gate}: there is no factor to fold"):
        fold_gates(model)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_map_that_others_read_takes_no_factor(placement: Any) -> None:
    model = inject_se(timm.create_model("resnet18"), example_input=X, placement=placement)
    with pytest.raises(ExportError, match="has nowhere to go"):
        fold_gates(model)


def test_stock_without_biases_has_biases_of_zero() -> None:
    base = randomize(timm.create_model("resnet18"))
    model = opened(inject_se(base, example_input=X, bias=False))
    stock = to_stock(model)
    torch.testing.assert_close(stock(X), model(X), rtol=1e-5, atol=1e-6)
    assert not stock.layer1[0].se.fc1.bias.any()
    assert model.layer1[0].se.fc1.bias is None


@pytest.mark.filterwarnings("ignore")  # of torch.export, about itself
def test_a_variant_has_a_program_of_its_own(tmp_path: Path) -> None:
    options = {"placement": "post", "squeeze": "max", "gate": "hard_sigmoid", "bias": False}
    model = opened(inject_se(timm.create_model("test_resnet"), example_input=X, **options))
    write_torch_export(model, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(X), model(X), rtol=1e-5, atol=1e-6)


def test_weight_standardisation_takes_no_factor() -> None:
    """nf_resnet26's ScaledStdConv2d is a Conv2d, and takes any scale out of its weight."""
    with pytest.raises(ExportError, match="conv3, which is no norm or convolution"):
        fold_gates(inject_se(timm.create_model("nf_resnet26")))


NO_STOCK = {
    "placement": (
        lambda: inject_se(timm.create_model("resnet18"), placement="pre"),
        r"no network of timm has SE blocks with placement='pre', as 'layer1.0' has. `--format",
    ),
    "squeeze and gate": (
        lambda: inject_se(timm.create_model("resnet18"), squeeze="max", gate="tanh", bias=False),
        "has SE blocks with squeeze='max', gate='tanh', as",
    ),
    "no name": (
        lambda: inject_se(timm.create_model("mobilenetv2_035")),
        "timm has no network like mobilenetv2_035 .*torch-export",
    ),
    "no timm": (lambda: inject_se(torchvision.models.resnet18()), "ResNet is not from timm"),
    "one site less": (
        lambda: inject_se(timm.create_model("resnet18"), exclude="layer4.1"),
        "seresnet18 differs: layer4.1.se.fc1.weight is only in it",
    ),
    "other widths": (
        lambda: inject_se(timm.create_model("resnet18"), r=2),
        r"seresnet18 differs: layer1.0.se.fc1.weight is \[8",
    ),
}


@pytest.mark.parametrize("kind", NO_STOCK)
def test_where_timm_has_no_such_network(kind: str) -> None:
    build, message = NO_STOCK[kind]
    with pytest.raises(ExportError, match=message):
        to_stock(build())


def test_a_base_is_no_stock_network_yet() -> None:
    with pytest.raises(NoSiteError, match="has no SE block"):
        to_stock(timm.create_model("resnet18"))


def check_program_and_onnx(folder: Path, model: nn.Module) -> None:
    """``net.pt2`` and ``net.onnx`` give what the model gives for a batch of another size."""
    import onnxruntime

    x = torch.randn(3, *X.shape[1:])
    expected = model(x).detach()
    program = torch.export.load(folder / "net.pt2").module()
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-6)
    session = onnxruntime.InferenceSession(folder / "net.onnx")
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


# Few blocks in few stages: torch takes as long to export a network as it is deep. A ResNet is
# exported by the command, below.
SHALLOW: dict[str, dict[str, Any]] = {
    "test_convnext": {"depths": (1, 1, 0, 0)},
    "test_mambaout": {"depths": (1, 1), "dims": (16, 32)},
}


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
def test_programs_and_onnx_are_checked_and_serve_another_batch(name: str, tmp_path: Path) -> None:
    model = randomize(after_real_steps(name, **SHALLOW[name])).eval()
    write_torch_export(model, tmp_path / "net.pt2")
    write_onnx(model, tmp_path / "net.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pt2"]
    check_program_and_onnx(tmp_path, model)


def test_a_program_of_a_model_that_was_injected_with_one_image(tmp_path: Path) -> None:
    model = inject_se(timm.create_model("test_resnet"), example_input=X[:1])
    write_torch_export(model, tmp_path / "net.pt2")
    assert model.training  # as it was
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(X), model.eval()(X), rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """Whole numbers in, truth values and zeros out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.embed = nn.Embedding(4, 3)

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, ...]:
        y = x + self.conv(x) + self.embed(kind)[:, :, None, None]
        return y, y > 0, y * 0


def test_other_inputs_and_outputs_than_images_and_scores(tmp_path: Path) -> None:
    x = (X, torch.zeros(2, dtype=torch.long))
    model = inject_se(Odd(), 1, divisor=1, example_input=x).eval()
    write_torch_export(model, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(program(*x), model(*x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_a_stock_network_and_no_onnx(dtype: torch.dtype, tmp_path: Path) -> None:
    base = randomize(timm.create_model("resnet18"))
    model = opened(inject_se(base, example_input=SMALL)).to(dtype)
    assert next(to_stock(model).parameters()).dtype == dtype
    if dtype == torch.bfloat16:
        small = inject_se(small_net.build(), 4, divisor=1, example_input=SMALL).to(dtype)
        with pytest.raises(ExportError, match="ONNX cannot hold SmallNet"):
            write_onnx(small, tmp_path / "net.onnx")
        assert list(tmp_path.iterdir()) == []


def test_a_replaced_classifier_and_other_channels() -> None:
    model = timm.create_model("resnet18", in_chans=1)
    model.fc = nn.Linear(512, 7)
    stock = to_stock(inject_se(model, example_input=X[:, :1]))
    assert (stock.num_classes, stock.conv1.in_channels) == (7, 1)


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = after_real_steps("test_resnet")
    path = tmp_path / "net.pt2"
    path.write_text("the old one")
    program = torch.export.export(inject_se(timm.create_model("test_resnet")).eval(), (X,))
    monkeypatch.setattr(se_inject.keep.formats.program, "export_program", lambda *_: program)
    with pytest.raises(ExportError, match="gives other outputs than the model"):
        write_torch_export(model, path)
    assert path.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]


class Amplifies(nn.Module):
    """Each of its steps makes a difference about ten times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = torch.sin(20 * (x + self.conv(x)))
        return x


class Rounds(nn.Module):
    """The same function with one rounding more, or with another weight."""

    def __init__(self, inner: nn.Module, change: float = 0.0) -> None:
        super().__init__()
        self.inner = copy.deepcopy(inner)
        with torch.no_grad():
            self.inner.conv.weight.add_(change)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * 3 / 3)


def test_one_rounding_that_a_network_amplifies_is_no_difference() -> None:
    model = Amplifies()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad(), pytest.raises(AssertionError):
        torch.testing.assert_close(Rounds(model)(x), model(x), rtol=0, atol=1e-4)
    check_equal(model, Rounds(model), (x,), "a module")
    check_equal(model, lambda x: Rounds(model)(x), (x,), "a session")
    program = torch.export.export(Rounds(model), (x,)).module()
    check_equal(model, program, (x,), "a program")
    for wrong in (Rounds(model, 1e-3), lambda x: Rounds(model, 1e-3)(x), lambda x: model(x)[:, :2]):
        with pytest.raises(ExportError, match="gives other outputs than the model"):
            check_equal(model, wrong, (x,), "it")


def test_the_stock_file_itself_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    model = after_real_steps("resnet18", SMALL)
    save = safetensors.torch.save_file

    def spoilt(tensors: dict[str, Tensor], path: Path) -> None:
        save({**tensors, "conv1.weight": tensors["conv1.weight"] * 1.1}, path)

    monkeypatch.setattr(safetensors.torch, "save_file", spoilt)
    with pytest.raises(ExportError, match="the stock file gives other outputs"):
        FORMATS["stock"].write(model, tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")  # of torch.export and onnxscript, about themselves
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_what_loads_its_file(name: str, tmp_path: Path) -> None:
    import onnxruntime

    form = FORMATS[name]
    if name == "stock":
        model = after_real_steps("resnet18")
    else:
        model = opened(inject_se(small_net.build(), 4, divisor=1, example_input=X))
    hint = form.write(model, tmp_path / f"net{form.suffix}")
    loaded = eval(hint, {"timm": timm, "torch": torch, "onnxruntime": onnxruntime})
    if name == "onnx":
        (got,) = loaded.run(None, {loaded.get_inputs()[0].name: X.numpy()})
        got = torch.from_numpy(got)
    else:
        got = (loaded.eval() if name == "stock" else loaded)(X)
    torch.testing.assert_close(got, model(X), rtol=1e-4, atol=1e-4)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of resnet18 with 5 classes, in two files, and a small network in one."""
    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    model = randomize(timm.create_model("resnet18", num_classes=5))
    torch.save(model.state_dict(), folder / "base.pth")
    inject_se(model, example_input=X)
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_(0, 0.3)
    save_se(model, folder / "se.safetensors")
    small = opened(inject_se(randomize(timm.create_model("test_resnet")), example_input=X))
    save_se(small, folder / "all.safetensors", extra="trained")
    torch.save(small, folder / "small.pt")
    torch.save(model.eval()(X), folder / "y.pt")
    return folder


def test_stock_command_and_timm_alone(folder: Path, tmp_path: Path) -> None:
    """Base weights from a file; a process that never imports se_inject gets the same outputs."""
    output = tmp_path / "stock.safetensors"
    result = command(
        *("export", "resnet18", "--weights", str(folder / "se.safetensors")),
        *("--checkpoint", str(folder / "base.pth"), "--output", str(output)),
    )
    assert (result.returncode, result.stderr) == (0, "")
    call = f"timm.create_model('seresnet18', checkpoint_path={str(output)!r}, num_classes=5)"
    assert result.stdout == f"{output}: same outputs as the model. Load it with {call}\n"
    torch.save(X, tmp_path / "x.pt")
    program = f"""
import sys, timm, torch
model = {call}.eval()
torch.testing.assert_close(
    model(torch.load({str(tmp_path / "x.pt")!r})), torch.load({str(folder / "y.pt")!r})
)
assert not any(name.startswith("se_inject") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_other_formats(folder: Path, tmp_path: Path) -> None:
    """All weights are in the file, so the base needs none."""
    for target, suffix in (("torch-export", "pt2"), ("onnx", "onnx")):
        output = tmp_path / f"net.{suffix}"
        result = command(
            *("export", "test_resnet", "--weights", str(folder / "all.safetensors")),
            *("--format", target, "--output", str(output)),
        )
        assert (result.returncode, result.stderr) == (0, "")
        assert f"{output}: same outputs as the model." in result.stdout
        assert output.stat().st_size > 4 * 470_000  # all weights are in it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.pt2"]
    check_program_and_onnx(tmp_path, torch.load(folder / "small.pt", weights_only=False))


def test_other_attention_is_named_again(tmp_path: Path) -> None:
    base = randomize(timm.create_model("test_resnet"))
    inject_se(base, example_input=X, se_layer=Attention("eca"))
    save_se(base, tmp_path / "se.safetensors", extra="trained")
    arguments = ("export", "test_resnet", "--weights", str(tmp_path / "se.safetensors"))
    arguments += ("--format", "torch-export", "--output", str(tmp_path / "net.pt2"))
    result = command(*arguments)
    assert (result.returncode, result.stdout) == (1, "")
    assert "another se_layer" in result.stderr
    result = command(*arguments, "--attention", "eca")
    assert (result.returncode, result.stderr) == (0, "")


def test_clear_errors(folder: Path, tmp_path: Path) -> None:
    se, base = str(folder / "se.safetensors"), str(folder / "base.pth")
    out = str(tmp_path / "out.safetensors")
    cases = {
        ("resnet18", "--weights", base, "--output", out): "not a whole .safetensors file",
        ("resnet34", "--weights", se, "--checkpoint", base, "--output", out): "does not fit ResNet",
        ("resnet18", "--weights", se, "--checkpoint", se, "--output", out): "does not fit ResNet",
        ("resnet18", "--weights", se, "--checkpoint", base, "--output", "net.pt"): "must end in",
        ("resnet18", "--weights", se, "--checkpoint", base, "--output", "no/x.safetensors"): (
            "there is no folder no"
        ),
    }
    for arguments, message in cases.items():
        result = command("export", *arguments)
        assert (result.returncode, result.stdout) == (1, ""), arguments
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
