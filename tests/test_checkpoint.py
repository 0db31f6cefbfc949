"""save_se and load_se: the added weights in one small file, on the right base only."""

import copy
import functools
import json
import os
import pickle
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import first_tensor, randomize
from processes import ended, started
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import EvoNorm2dB0, create_attn
from torch import Tensor, nn

import se_inject.keep.load
from se_inject import (
    ArgumentError,
    CheckpointError,
    NoSiteError,
    SqueezeExcite,
    UnsupportedModelError,
    inject_se,
    load_se,
    save_se,
    se_parameters,
)
from se_inject.edit.block_class import edit_of
from se_inject.models.names import load_model

X = torch.randn(2, 3, 64, 64)


def base(name: str = "resnet18", **options: Any) -> nn.Module:
    model = copy.deepcopy(_base(name, **options))
    torch.manual_seed(0)  # what comes next is the same where the model had been built before
    return model


@functools.lru_cache(maxsize=2)
def _base(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **options) if options else load_model(name)
    return randomize(model).eval()


def trained(name: str = "resnet18", x: Tensor = X, **options: Any) -> nn.Module:
    return opened(inject_se(base(name, **options), example_input=x))


@torch.no_grad()
def opened(model: nn.Module) -> nn.Module:
    """Gates that depend on the input; not those that FastViT has of its own."""
    for p in se_parameters(model):
        p.normal_(0, 0.3)
    return model


@torch.no_grad()
def output(model: nn.Module, x: Tensor = X) -> Tensor:
    return first_tensor(model(x))


FAMILIES = {
    "resnet18": X,
    "mobilenetv2_035": X,
    "test_convnext": X,
    "test_mambaout": X,  # channels last: Linears
    "regnetx_002": X,
    "dla46x_c": X,
    "efficientvit_b0": X,
    "fastvit_t8": X,
    "levit_conv_128s": torch.randn(1, 3, 224, 224),  # two SE blocks in a block
    "torchvision/mc3_18": torch.randn(1, 3, 4, 64, 64),  # video
    "torchvision/fcn_resnet50": X,
    "hrnet_w18_small": X,
}


@pytest.mark.filterwarnings("ignore::UserWarning:timm")
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    x = FAMILIES[name]
    model = trained(name, x)
    save_se(model, tmp_path / "se.safetensors")
    again = base(name)
    assert not torch.equal(output(again, x), output(model, x))
    assert load_se(again, tmp_path / "se.safetensors") is again
    assert torch.equal(output(again, x), output(model, x))
    assert list(again.state_dict()) == list(model.state_dict())


def test_the_file_of_resnet50_has_the_size_of_its_se_blocks(tmp_path: Path) -> None:
    save_se(inject_se(timm.create_model("resnet50")), tmp_path / "se.safetensors")
    assert os.path.getsize(tmp_path / "se.safetensors") / (4 * 2_530_992) == pytest.approx(
        1, abs=0.02
    )


def test_load_in_a_new_process(tmp_path: Path) -> None:
    model = trained()
    save_se(model, tmp_path / "se.safetensors")
    torch.save(X, tmp_path / "x.pt")
    program = f"""
import torch
from test_checkpoint import base, load_se
model = load_se(base(), {str(tmp_path / "se.safetensors")!r})
torch.save(model(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
"""
    assert ended(program).stderr == ""
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(X))


# --- what else goes into the file ----------------------------------------------------------------


def after_a_step(model: nn.Module) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    return model.eval()


def test_trained_takes_all_that_can_have_changed(tmp_path: Path) -> None:
    model = inject_se(base(), example_input=X).requires_grad_(False)
    for p in (*se_parameters(model), *model.fc.parameters()):
        p.requires_grad_(True)
    after_a_step(model)  # the BatchNorms count on
    save_se(model, tmp_path / "se.safetensors", extra="trained")
    keys = set(load_file(tmp_path / "se.safetensors"))
    assert {"fc.weight", "fc.bias", "bn1.running_mean", "bn1.num_batches_tracked"} <= keys
    assert "conv1.weight" not in keys
    assert "bn1.weight" not in keys
    assert torch.equal(output(load_se(base(), tmp_path / "se.safetensors")), output(model))


def test_globs_name_what_else(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.fc.weight.mul_(2)
    save_se(model, tmp_path / "se.safetensors", extra=["fc.*", "bn1.*"])
    assert {"fc.weight", "bn1.running_var"} <= set(load_file(tmp_path / "se.safetensors"))
    assert torch.equal(output(load_se(base(), tmp_path / "se.safetensors")), output(model))
    with pytest.raises(ArgumentError, match=r"extra='heads.\*' matches no tensor of the base"):
        save_se(model, tmp_path / "se.safetensors", extra="heads.*")


def test_what_was_trained_and_not_saved_is_an_error(tmp_path: Path) -> None:
    model = after_a_step(trained())
    save_se(model, tmp_path / "se.safetensors")
    with pytest.raises(
        CheckpointError, match=r"have other values: 'conv1.weight', .*extra=\"trained\""
    ):
        load_se(base(), tmp_path / "se.safetensors")


def test_ratios_and_a_second_injection_come_back(tmp_path: Path) -> None:
    model = inject_se(base(), {"layer4.*": 32, "*": 8}, include=["layer1.*", "layer4.*"])
    inject_se(model, 4, include="layer2.0", divisor=1, init="paper")
    opened(model)
    save_se(model, tmp_path / "se.safetensors")
    again = load_se(base(), tmp_path / "se.safetensors")
    assert torch.equal(output(again), output(model))
    assert [type(m.se) for m in again.layer3 if getattr(m, "se", None)] == []
    settings = edit_of(again.layer2[0]).settings
    assert (settings.r, settings.variant.divisor, settings.variant.init) == ((4,), 1, "paper")


def test_a_file_from_before_there_were_variants(tmp_path: Path) -> None:
    model = trained()
    save_se(model, tmp_path / "se.safetensors")

    def as_format_1(header: dict[str, Any], _: dict[str, Tensor]) -> None:
        header["format"] = 1
        for site in header["sites"]:
            assert site["settings"].pop("where") == "auto"
            assert site["settings"].pop("squeeze") == "avg"
            assert site["settings"].pop("gate") == "sigmoid"
            assert site["settings"].pop("bias") is True
            assert set(site["settings"]) == {"divisor", "placement", "init", "custom", "example"}

    rewritten(tmp_path / "se.safetensors", as_format_1)
    assert torch.equal(output(load_se(base(), tmp_path / "se.safetensors")), output(model))


@pytest.mark.parametrize("placement", ["pre", "post", "identity", "3x3"])
def test_variants_come_back(placement: Any, tmp_path: Path) -> None:
    options = {"squeeze": "max", "gate": "tanh", "bias": False}
    model = opened(inject_se(base(), 8, placement=placement, include="layer1.*", **options))
    opened(inject_se(model, 4, include="layer2.*", squeeze="none", gate="relu", init="paper"))
    save_se(model, tmp_path / "se.safetensors")
    again = load_se(base(), tmp_path / "se.safetensors")
    assert torch.equal(output(again), output(model))
    assert edit_of(again.layer1[0]).settings == edit_of(model.layer1[0]).settings
    assert edit_of(again.layer2[0]).settings == edit_of(model.layer2[0]).settings
    assert torch.equal(output(pickle.loads(pickle.dumps(copy.deepcopy(again)))), output(model))


def test_another_attention_has_to_be_given_again(tmp_path: Path) -> None:
    def eca(channels: int) -> nn.Module:
        return create_attn("eca", channels)

    model = inject_se(base(), example_input=X, se_layer=eca)
    save_se(model, tmp_path / "se.safetensors")
    with pytest.raises(CheckpointError, match=r"load_se\(base, path, se_layer="):
        load_se(base(), tmp_path / "se.safetensors")
    again = load_se(base(), tmp_path / "se.safetensors", se_layer=eca)
    assert torch.equal(output(again), output(model))


def test_a_model_without_se_blocks_has_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(NoSiteError, match="no SE block to save"):
        save_se(base(), tmp_path / "se.safetensors")


def test_a_compiled_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="compiled"):
        save_se(torch.compile(trained()), tmp_path / "se.safetensors")


def test_where_a_file_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="there is no folder"):
        save_se(trained(), tmp_path / "no" / "se.safetensors")
    with pytest.raises(ArgumentError, match="is a folder"):
        save_se(trained(), tmp_path)


# --- files that do not fit -----------------------------------------------------------------------


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["se_inject"])


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    header, tensors = header_of(path), load_file(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"se_inject": json.dumps(header)})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hostile-code-ran",)


def hostile(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile()))


def hostile_zip(path: Path) -> None:
    torch.save(Hostile(), path)


def newer(path: Path) -> None:
    rewritten(path, lambda header, _: header.update(format=5, version="9.9"))


def older(path: Path) -> None:
    rewritten(path, lambda header, _: header.update(format=0, version="0.0.1"))


def without_sites(path: Path) -> None:
    rewritten(path, lambda header, _: header.pop("sites"))


def damaged_site(path: Path) -> None:
    rewritten(path, lambda header, _: header["sites"][0].update(bogus=1))


def damaged_example(path: Path) -> None:
    rewritten(
        path, lambda header, _: header.update(examples=[{"tensor": [-1], "dtype": "float32"}])
    )


def other_width(path: Path) -> None:
    rewritten(path, lambda header, _: header["sites"][0].update(bottleneck=16))


def unknown_gate(path: Path) -> None:
    rewritten(path, lambda header, _: header["sites"][0]["settings"].update(gate="step"))


def bias_as_text(path: Path) -> None:
    rewritten(path, lambda header, _: header["sites"][0]["settings"].update(bias="no"))


def unknown_block(path: Path) -> None:
    rewritten(path, lambda header, _: header["sites"][0].update(block="layer9.0"))


def missing_key(path: Path) -> None:
    rewritten(path, lambda _, tensors: tensors.pop("layer3.1.se.fc2.bias"))


def foreign_key(path: Path) -> None:
    rewritten(path, lambda _, tensors: tensors.update(surprise=torch.zeros(1)))


def wrong_shape(path: Path) -> None:
    rewritten(path, lambda _, t: t.update({"layer1.0.se.fc1.bias": torch.zeros(9)}))


BAD_FILES = {
    truncated: "not a whole .safetensors file",
    foreign: "not one of save_se",
    hostile: "not a whole .safetensors file",
    hostile_zip: "not a whole .safetensors file",
    newer: "made by se-inject 9.9 in format 5; .* Upgrade",
    older: "made by se-inject 0.0.1 in format 0; .* Load it with that version",
    without_sites: "its header is damaged",
    damaged_site: "its header is damaged",
    damaged_example: "its header is damaged",
    unknown_gate: "does not fit this base: gate='step' is not known; use 'sigmoid', 'tanh'",
    bias_as_text: "its header is damaged .*bias 'no'",
    other_width: r"has widths \(64, 16\), and here it is \(64, 8\)",
    unknown_block: "does not fit this base: .*layer9.0",
    missing_key: "the file lacks 'layer3.1.se.fc2.bias'",
    foreign_key: "the file has 'surprise'",
    wrong_shape: r"layer1.0.se.fc1.bias is \[9\] float32 in the file and \[8\] float32",
    Path.unlink: "there is no such file",
}


@pytest.mark.parametrize("spoil", BAD_FILES, ids=lambda spoil: spoil.__name__)
def test_a_bad_file_is_one_clear_error_and_the_base_stays(
    spoil: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "se.safetensors"
    save_se(trained(), path, extra="fc.*")
    spoil(path)
    model = base()
    with torch.no_grad():
        model.fc.weight.add_(1)  # what the file would replace
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=BAD_FILES[spoil]) as caught:
        load_se(model, path)
    assert len(str(caught.value).splitlines()) <= 2
    assert not Path("hostile-code-ran").exists()
    assert type(model.layer1[0]) is timm.models.resnet.BasicBlock
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def other_weights(block: str, index: int) -> nn.Module:
    model = base()
    with torch.no_grad():
        model.get_submodule(block).conv1.weight.view(-1)[index] += 1e-6
    return model


BAD_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "classes": (lambda: base(num_classes=10), r"fc.weight is \[1000, 512\] there and \[10, 512\]"),
    "dtype": (lambda: base().half(), "is float32 there and float16 here"),
    "smaller": (lambda: base("resnet10t"), "has no 'conv1.weight'"),
    "deeper": (lambda: base("resnet34"), "also has 'layer1.2.conv1.weight'"),
    "first value": (
        lambda: other_weights("layer2.0", 0),
        "1 of 122 tensors .* other values: 'layer2.0.conv1.weight'",
    ),
    "last value": (
        lambda: other_weights("layer4.1", -1),
        "1 of 122 tensors .* other values: 'layer4.1.conv1.weight'",
    ),
    "meta": (lambda: base().to("meta"), "on the meta device"),
    "injected": (trained, r"has SE blocks already.*remove_se\(model\) first"),
}


@pytest.mark.parametrize("kind", BAD_BASES)
def test_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    save_se(trained(), tmp_path / "se.safetensors")
    build, message = BAD_BASES[kind]
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_se(model, tmp_path / "se.safetensors")
    assert list(model.state_dict()) == keys


def test_an_interrupt_while_loading_leaves_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_se(trained(), tmp_path / "se.safetensors", extra="fc.*")

    def interrupted(model: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            model.fc.weight.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(se_inject.keep.load, "_fill", interrupted)
    model = base()
    with pytest.raises(KeyboardInterrupt):
        load_se(model, tmp_path / "se.safetensors")
    assert torch.equal(output(model), output(base()))
    assert type(model.layer1[0]) is timm.models.resnet.BasicBlock


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "se.safetensors"
    model = trained()
    save_se(model, path)
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_se(model, path, extra="fc.*")
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["se.safetensors"]


def test_kill_minus_nine_never_leaves_half_a_file(tmp_path: Path) -> None:
    """A process saves over and over, until it is killed at some moment."""
    path = tmp_path / "se.safetensors"
    program = f"""
from test_checkpoint import save_se, trained
model = trained()
while True:
    save_se(model, {str(path)!r}, extra="*")
"""
    moments, expected = random.Random(0), output(trained())
    for _ in range(4):
        path.unlink(missing_ok=True)
        child = started(program)
        while not path.exists():  # until there is a first file
            assert child.exitcode is None
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 0.5))
        child.kill()
        child.join()
        assert torch.equal(output(load_se(base(), path)), expected)


def test_half_precision_and_shared_tensors(tmp_path: Path) -> None:
    model = trained().to(torch.bfloat16)
    model.layer1[1].se.fc2.bias = model.layer1[0].se.fc2.bias
    save_se(model, tmp_path / "se.safetensors")
    again = load_se(base().to(torch.bfloat16), tmp_path / "se.safetensors")
    x = X.to(torch.bfloat16)
    assert torch.equal(output(again, x), output(model, x))


# --- networks that are not so plain --------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x))


Y = torch.randn(2, 16, 8, 8)


def both(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Injected and opened, and a copy of the base."""
    base = copy.deepcopy(model.eval())
    return opened(inject_se(model, example_input=Y)), base


def test_ones_own_se_block_as_se_layer_has_to_be_given_again(tmp_path: Path) -> None:
    model, again = Block().eval(), Block().eval()
    again.load_state_dict(model.state_dict())
    inject_se(model, example_input=Y, se_layer=lambda c: SqueezeExcite(c, 8, init="paper"))
    save_se(model, tmp_path / "se.safetensors")
    with pytest.raises(CheckpointError, match="another se_layer"):
        load_se(again, tmp_path / "se.safetensors")


def test_a_base_with_another_eps_is_a_warning(tmp_path: Path) -> None:
    model, again = both(Block())
    save_se(model, tmp_path / "se.safetensors")
    again.norm.eps = 1e-3
    with pytest.warns(UserWarning, match=r"'norm' of this base has another class or setting"):
        load_se(again, tmp_path / "se.safetensors")


class Extra(Block):
    def get_extra_state(self) -> Any:
        return {"k": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_extra_state_is_said_not_to_be_saved(tmp_path: Path) -> None:
    model, again = both(Extra())
    with pytest.warns(UserWarning, match=r"_extra_state' comes from get_extra_state"):
        save_se(model, tmp_path / "se.safetensors", extra="*")
    assert torch.equal(load_se(again, tmp_path / "se.safetensors")(Y), model(Y))


def test_tensors_that_a_state_dict_copies_cannot_be_set_and_that_is_said(tmp_path: Path) -> None:
    model, again = both(nn.Sequential(Block()))
    save_se(model, tmp_path / "se.safetensors", extra="0.conv.*")
    with torch.no_grad():
        again[0].conv.weight.add_(1)
    again[0].conv.register_state_dict_post_hook(
        lambda _, state, prefix, __: state.update(
            {f"{prefix}weight": state[f"{prefix}weight"].clone()}
        )
    )
    with pytest.raises(CheckpointError, match=r"'0.conv.weight' cannot be set"):
        load_se(again, tmp_path / "se.safetensors")
    assert type(again[0]) is Block


def test_channels_last_weights(tmp_path: Path) -> None:
    model = trained().to(memory_format=torch.channels_last)
    save_se(model, tmp_path / "se.safetensors", extra="trained")
    again = base().to(memory_format=torch.channels_last)
    assert torch.equal(output(load_se(again, tmp_path / "se.safetensors")), output(model))


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(Block())
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_block_with_two_names(tmp_path: Path) -> None:
    model, again = both(Shares())
    save_se(model, tmp_path / "se.safetensors")
    assert torch.equal(load_se(again, tmp_path / "se.safetensors")(Y), model(Y))


class OtherStatistics(Block):
    """EvoNorm has a running_var and no running_mean; spectral norm has vectors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.spectral_norm(self.conv)
        self.norm = EvoNorm2dB0(16)


def test_trained_takes_all_statistics(tmp_path: Path) -> None:
    model, again = both(nn.Sequential(OtherStatistics()))
    with torch.no_grad():
        model.train()(Y)
    save_se(model.eval(), tmp_path / "se.safetensors", extra="trained")
    assert torch.equal(load_se(again, tmp_path / "se.safetensors")(Y), model(Y))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        return self.b(x) if second else self.a(x)


def test_two_injections_with_two_examples(tmp_path: Path) -> None:
    model = Flagged().eval()
    again = copy.deepcopy(model)
    inject_se(model, example_input={"x": Y, "second": False})
    opened(inject_se(model, example_input={"x": Y, "second": True}))
    save_se(model, tmp_path / "se.safetensors")
    load_se(again, tmp_path / "se.safetensors")
    for second in (False, True):
        assert torch.equal(again(Y, second), model(Y, second))


def nested(header: dict[str, Any], **changes: Any) -> None:
    header["sites"][0]["settings"].update(changes)


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "list for a number": lambda header: nested(header, divisor=[1]),
    "number for a name": lambda header: header["sites"][0].update(block=5),
    "no example": lambda header: nested(header, example=None),
    "text for the format": lambda header: header.update(format="1"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_header_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "se.safetensors"
    model, again = both(nn.Sequential(Block()))
    save_se(model, path)
    rewritten(path, lambda header, _: DAMAGED[kind](header))
    with pytest.raises(CheckpointError, match="its header is damaged"):
        load_se(again, path)


def test_another_dtype_in_the_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "se.safetensors"
    model, again = both(nn.Sequential(Block()))
    save_se(model, path)
    rewritten(path, lambda _, t: t.update({k: v.to(torch.int8) for k, v in t.items()}))
    with pytest.raises(CheckpointError, match=r"int8 in the file and .* float32 in the model"):
        load_se(again, path)


class Cached(Block):
    @functools.cached_property
    def half(self) -> float:
        return 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.half * self.norm(self.conv(x))


class Assigns(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = 0.5
        return x + self.last * self.norm(self.conv(x))


def test_a_cached_property_that_was_never_read(tmp_path: Path) -> None:
    """The saved model ran before it was injected, and the base did not."""
    model, again = Cached().eval(), Cached().eval()
    again.load_state_dict(model.state_dict())
    model(Y)
    save_se(opened(inject_se(model, example_input=Y)), tmp_path / "se.safetensors")
    assert "half" not in vars(again)
    assert torch.equal(load_se(again, tmp_path / "se.safetensors")(Y), model(Y))
    with pytest.raises(NoSiteError, match=r"its forward sets self\.last"):
        inject_se(Assigns(), example_input=Y)
