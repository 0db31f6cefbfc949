"""Other attention begins with the function of the base, to the last bit, and learns from there."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import randomize
from safetensors import safe_open
from torch import Tensor, nn

from se_inject import (
    IdentityStart,
    inject_se,
    load_se,
    plan_se,
    remove_se,
    save_se,
    se_parameters,
)
from se_inject.edit.block_class import edit_of
from se_inject.gates import fold_se
from se_inject.keep.beside import described, repeat
from se_inject.layers.attention import ATTENTIONS, Attention
from se_inject.layers.identity_start import FromIdentity
from se_inject.layers.squeeze_excite import SqueezeExcite

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
# What a layer needs more than channels: a size of maps, or one that its windows divide.
NEED_SIZES = {"bottleneck", "halo", "bat"}
KINDS = [name for name in ATTENTIONS if name not in NEED_SIZES]


def base() -> nn.Module:
    torch.manual_seed(0)
    return randomize(timm.create_model("test_resnet", num_classes=4)).eval()


def unwrapped(channels: int) -> nn.Module:
    return Attention("eca")(channels)


def header_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["se_inject"])


# The non-local layer gives its maps another memory format; others have norms that train.
@pytest.mark.parametrize("name", ["se", "eca", "cbam", "gc", "coord", "nl"])
def test_a_network_begins_with_the_function_of_the_base(name: str) -> None:
    model = base()
    before = model(X)
    before_in_train = copy.deepcopy(model).train()(X)
    inject_se(model, example_input=X, se_layer=Attention(name))
    assert torch.equal(model(X), before)
    assert torch.equal(model.train()(X), before_in_train)


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_begins_as_the_identity_and_has_a_gradient_there(name: str) -> None:
    torch.manual_seed(0)
    layer = FromIdentity(Attention(name))(16)
    assert isinstance(layer, IdentityStart)
    x = torch.randn(2, 16, 14, 14)
    assert torch.equal(layer.eval()(x), x)
    out = layer.train()(x)
    assert torch.equal(out, x)
    out.square().sum().backward()
    assert layer.alpha.grad.abs() > 1e-3


def test_paper_leaves_the_layers_as_timm_builds_them() -> None:
    model = base()
    before = model(X)
    inject_se(model, example_input=X, se_layer=Attention("cbam"), init="paper")
    assert not any(isinstance(m, IdentityStart) for m in model.modules())
    assert not torch.allclose(model(X), before)


def test_a_users_own_layers_are_inserted_as_they_are_or_in_a_start() -> None:
    model = inject_se(base(), example_input=X, se_layer=unwrapped)
    assert not any(key.endswith("alpha") for key in model.state_dict())
    before = base()(X)
    assert not torch.allclose(model(X), before)
    started = inject_se(base(), example_input=X, se_layer=lambda c: IdentityStart(unwrapped(c)))
    assert torch.equal(started(X), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_and_smallest_values_stay(dtype: torch.dtype) -> None:
    layer = IdentityStart(nn.Sigmoid()).to(dtype)
    info = torch.finfo(dtype)
    x = torch.tensor([info.max, info.min, info.tiny, info.eps, -0.0, 1.0], dtype=dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), x)


def test_under_autocast_the_dtype_of_the_map_stays() -> None:
    layer = IdentityStart(nn.Conv2d(4, 4, 1))
    x = torch.randn(1, 4, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16()):
            assert layer(given).dtype == given.dtype
            assert torch.equal(layer(given), given)


def test_at_one_the_layer_stands_alone() -> None:
    inner = nn.Conv2d(4, 4, 1)
    layer = IdentityStart(inner)
    nn.init.ones_(layer.alpha)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(layer(x), inner(x))
    layer.reset_parameters()
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("name", ["eca", "cbam"])
def test_alpha_learns_first_and_the_layer_after_one_step(name: str) -> None:
    model = inject_se(base(), example_input=X, se_layer=Attention(name)).train()
    starts = [m for m in model.modules() if isinstance(m, IdentityStart)]
    ours = {id(p) for p in se_parameters(model)}
    assert starts
    assert all(id(p) in ours for start in starts for p in start.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().sum().backward()

    def moves(*parameters: Tensor) -> bool:
        return any(bool(p.grad.any()) for p in parameters)

    step()
    assert all(moves(start.alpha) for start in starts)
    assert not any(moves(*start.layer.parameters()) for start in starts)
    optimizer.step()
    step()
    assert all(moves(*start.layer.parameters()) for start in starts)


def opened(model: nn.Module) -> nn.Module:
    for start in model.modules():
        if isinstance(start, IdentityStart):
            nn.init.constant_(start.alpha, 0.7)
    return model


@pytest.mark.parametrize("given", [Attention("cbam"), lambda c: Attention("cbam")(c)])
def test_a_file_says_that_the_layers_began_so(tmp_path: Path, given: object) -> None:
    model = opened(inject_se(base(), example_input=X, se_layer=Attention("cbam")))
    save_se(model, tmp_path / "se.safetensors")
    header = header_of(tmp_path / "se.safetensors")
    assert header["format"] == 4
    assert {site["settings"]["init"] for site in header["sites"]} == {"identity"}
    again = load_se(base(), tmp_path / "se.safetensors", se_layer=given)
    assert torch.equal(again(X), model(X))
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(again)))(X), model(X))
    other = repeat(base(), described(model), "config.json", given)
    assert list(other.state_dict()) == list(model.state_dict())


def test_a_file_says_that_the_layers_stand_alone(tmp_path: Path) -> None:
    model = inject_se(base(), example_input=X, se_layer=Attention("eca"), init="paper")
    save_se(model, tmp_path / "se.safetensors")
    assert header_of(tmp_path / "se.safetensors")["format"] == 3
    again = load_se(base(), tmp_path / "se.safetensors", se_layer=Attention("eca"))
    assert torch.equal(again(X), model(X))
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_plan_from_before_there_was_a_start_puts_none_in() -> None:
    model = inject_se(base(), example_input=X, se_layer=unwrapped)
    plan = described(model)
    for site in plan["sites"]:  # the words of older versions
        assert site["settings"]["init"] == "paper"
        site["settings"]["init"] = "identity"
    assert plan["format"] == 3
    again = repeat(base(), plan, "config.json", Attention("eca"))
    assert list(again.state_dict()) == list(model.state_dict())


def test_the_layers_are_taken_out_again() -> None:
    plain = base()
    model = inject_se(base(), example_input=X, se_layer=Attention("gc"))
    assert sum(key.endswith(".se.alpha") for key in model.state_dict()) == len(
        plan_se(plain, example_input=X).sites
    )
    remove_se(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(X), plain(X))


def test_the_report_counts_alpha() -> None:
    wrapped = plan_se(base(), se_layer=Attention("eca"))
    bare = plan_se(base(), se_layer=Attention("eca"), init="paper")
    assert [s.params for s in wrapped.sites] == [s.params + 1 for s in bare.sites]
    assert wrapped.added.macs == bare.added.macs
    model = base()
    before = sum(p.numel() for p in model.parameters())
    inject_se(model, se_layer=Attention("eca"))
    assert sum(p.numel() for p in model.parameters()) == before + wrapped.added.params


def test_folding_leaves_them_with_a_reason() -> None:
    model = base()
    inject_se(model, example_input=X, include="layer1.*", se_layer=Attention("cbam"))
    inject_se(model, example_input=X, exclude="layer1.*")
    folding = fold_se(model, [X])
    assert folding.kept["layer1.0"] == "CbamModule is no SE block, and its scale is not known"
    assert edit_of(model.get_submodule("layer1.0"))
    assert not any(isinstance(m, SqueezeExcite) for m in model.modules())


def test_it_is_exported() -> None:
    layer = opened(nn.Sequential(FromIdentity(Attention("eca"))(16)))
    x = torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
