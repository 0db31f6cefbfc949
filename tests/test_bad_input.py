"""Bad input gets one or two lines that say what to do, and the model is as it was."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from se_inject import (
    ArgumentError,
    NoSiteError,
    SEInjectError,
    UnknownModelError,
    UnsupportedModelError,
    inject_se,
    plan_se,
    remove_se,
    se_parameters,
)
from se_inject.models.names import load_model


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("test_resnet").eval()


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, r"r=0 is not a positive whole number: the reduction ratio"),
    ({"r": -4}, r"r=-4 is not a positive whole number"),
    ({"r": 2.5}, r"r=2\.5 is not a positive whole number"),
    ({"r": "abc"}, r"r='abc' is not a positive whole number"),
    ({"r": True}, r"r=True is not a positive whole number"),
    ({"r": None}, r"r=None is not a positive whole number"),
    ({"r": {"*": 0}}, r"r=0 is not a positive whole number"),
    ({"r": {}}, r"r=\{\} gives no number for any block\. Write \{'\*': 16\}"),
    ({"r": {"layer1.*": 8}}, r"gives no number for block 'layer2\.0'\. Add '\*': 16"),
    ({"r": {"nothing": 8, "*": 16}}, r"r='nothing' matches no block"),
    ({"divisor": 2**40}, r"an SE block of 'layer1\.0' .* cannot be made: divisor=1099511627776 is"),
    ({"divisor": 2**70}, r"cannot be made: divisor=\d+ is too large \(8 is usual\)"),
    ({"divisor": 0}, r"divisor=0 is not a positive whole number: 8 as in timm"),
    ({"placement": "somewhere"}, r"placement='somewhere' is not known; use 'standard'"),
    ({"init": "random"}, r"init='random' is not known; use 'identity' or 'paper'"),
    ({"se_layer": 3}, r"se_layer=3 is not callable"),
    (
        {"se_layer": lambda c: None},
        r"se_layer\(32\) returned NoneType\. It must return an nn\.Module",
    ),
    (
        {"se_layer": lambda c: nn.Conv2d(c, c, 3)},
        r"se_layer\(32\) turns a map \[1, 32, \d+, \d+\] into \[1, 32, \d+, \d+\]",
    ),
    ({"include": "layer9.*"}, r"include='layer9\.\*' matches no block .* 'layer\d\.\d'"),
    ({"exclude": ["layer1.*", "stem"]}, r"exclude='stem' matches no block with an addition"),
    ({"include": 3}, r"include takes a glob or a list of globs on names, not 3"),
    ({"include": [3]}, r"include takes a glob or a list of globs on names, not 3"),
]


@pytest.mark.parametrize(("kwargs", "message"), ARGUMENTS, ids=[m for _, m in ARGUMENTS])
def test_a_bad_argument_is_named_and_nothing_changes(
    model: nn.Module, kwargs: dict[str, Any], message: str
) -> None:
    keys = list(model.state_dict())
    with pytest.raises(ArgumentError, match=message) as caught:
        inject_se(model, **kwargs)
    assert len(str(caught.value).splitlines()) <= 2
    assert list(model.state_dict()) == keys


def test_a_huge_ratio_works_with_the_least_width_and_says_so(model: nn.Module) -> None:
    with pytest.warns(UserWarning, match=r"r=1000000 is more than the channels of any block"):
        plan = plan_se(model, r=10**6)
    assert {site.bottleneck for site in plan.sites} == {8}
    with pytest.warns(UserWarning, match=r"kept at width 1, never under divisor=1"):
        plan = plan_se(model, r=10**6, divisor=1)
    assert {site.bottleneck for site in plan.sites} == {1}
    for call in (plan_se, inject_se):  # through one more call of the package or without
        with pytest.warns(UserWarning, match=r"r=1000000") as caught:
            call(model, r=10**6)
        assert caught[0].filename == __file__


def test_an_ordinary_ratio_does_not_warn(model: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_se(model, r=16)


def test_exclude_wins_over_include(model: nn.Module) -> None:
    plan = plan_se(model, include="layer[12].*", exclude="layer2.*")
    assert {site.block for site in plan.sites} == {"layer1.0"}
    assert {s.block for s in plan.skipped if s.reason == "excluded by the user"} == {
        "layer2.0",
        "layer3.0",
        "layer4.0",
    }


def test_everything_excluded_is_an_error(model: nn.Module) -> None:
    with pytest.raises(NoSiteError, match="4 x excluded by the user"):
        inject_se(model, exclude="*")


# --- models that cannot be edited as they are --------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


UNSUPPORTED: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda m: torch.compile(m, backend="eager"), r"is compiled\. Inject first"),
    (compiled_in_place, r"is compiled\. Inject first"),
    (nn.DataParallel, r"wrapper for parallel runs\. Inject into the model inside it"),
    (lambda m: torch.jit.trace(m, torch.randn(1, 3, 64, 64)), r"is TorchScript"),
    (lambda m: nn.Sequential(nn.LazyConv2d(3, 1), m), r"uninitialised lazy parameters"),
    (lambda m: "resnet50", r"expected an nn\.Module, got str"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize(("wrap", "message"), UNSUPPORTED, ids=[m for _, m in UNSUPPORTED])
def test_a_wrapped_model_is_refused(
    model: nn.Module, wrap: Callable[[nn.Module], Any], message: str
) -> None:
    wrapped = wrap(model)
    with pytest.raises(UnsupportedModelError, match=message):
        inject_se(wrapped)


def test_a_ddp_model_is_refused(model: nn.Module, process_group: None) -> None:
    with pytest.raises(UnsupportedModelError, match=r"Inject into the model inside it \(`model\.m"):
        inject_se(nn.parallel.DistributedDataParallel(model))


def test_a_compiled_model_inside_another_is_found(model: nn.Module) -> None:
    model.layer1 = torch.compile(model.layer1, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"'layer1' \(OptimizedModule\) is compiled"):
        inject_se(model)


def test_a_forward_that_raises_is_named(model: nn.Module) -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    model.layer3 = Broken()
    with pytest.raises(SEInjectError, match=r"forward of 'layer3' failed .* KeyError") as caught:
        inject_se(model)
    assert len(str(caught.value).splitlines()) <= 2


def test_remove_without_blocks_is_an_error(model: nn.Module) -> None:
    with pytest.raises(SEInjectError, match="has no SE block from inject_se"):
        remove_se(model)
    assert list(se_parameters(model)) == []


# --- models by name ----------------------------------------------------------------------------

NAMES = [
    ("resnet5O", r"no model 'resnet5O' in timm or torchvision\. Near names: .*resnet50"),
    ("torchvision/resnet1000", r"no model .* Near names: .*resnet10"),
    ("qqqq", r"no model 'qqqq' in timm or torchvision\. See timm\.list_models"),
    ("no_such_pkg:build", r"cannot import 'no_such_pkg' for .*Write module:callable"),
    ("torchvision.models:resnet5O", r"has no callable 'resnet5O'\. Near names: resnet50"),
    ("timm:list_models", r"returned list, not an nn\.Module"),
    ("resnet50.a1_in1", r"timm's resnet50 has no tag 'a1_in1'\. Near tags: .*a1_in1k"),
    (":build", r"cannot import '' for ':build' \(ValueError: .*Write module:callable"),
    ("./nets.py:build", r"cannot import './nets.py' .*Write module:callable"),
    ("broken_at_import:build", r"cannot import 'broken_at_import' .*RuntimeError: at import"),
]


@pytest.mark.parametrize(("name", "message"), NAMES, ids=[n for n, _ in NAMES])
def test_an_unknown_model_gets_near_names(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_at_import.py").write_text("raise RuntimeError('at import')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match=message) as caught:
        load_model(name)
    assert len(str(caught.value).splitlines()) <= 2


def test_input_channels_of_a_torchvision_model_cannot_be_changed() -> None:
    with pytest.raises(ArgumentError, match="torchvision's resnet18 takes 3 input channels"):
        load_model("torchvision/resnet18", in_chans=4)


@pytest.mark.parametrize(
    "arguments", [("--img-size", "99999999999"), ("--in-chans", "99999999999999")]
)
def test_an_input_that_no_machine_can_hold(
    call: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...]
) -> None:
    status, out, err = call("test_resnet", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: an input of ")
    assert err.count("\n") == 1


def test_warnings_that_are_errors_are_one_line(call: Callable[..., tuple[int, str, str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, out, err = call("test_resnet", "--r", "1000000")
    assert (status, out) == (1, "")
    assert err.startswith("error: r=1000000 is more than the channels")
