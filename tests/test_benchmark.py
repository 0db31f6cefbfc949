"""``--benchmark``: what it prints, and when it refuses. No test asserts a time."""

import json
import re
from typing import Any

import pytest
import timm
import torch
from torch import nn

from se_inject import SqueezeExcite, inject_se, plan_se
from se_inject.edit.block_class import edit_of
from se_inject.errors import ArgumentError
from se_inject.report.latency import check_device, compare_latency, measure_latency


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_inject.report.latency._MIN_SECONDS", 0.0)


def test_the_report_ends_with_the_latency(call) -> None:
    status, out, _ = call("test_resnet", "--benchmark", "--batch-size", "2")
    assert status == 0
    number = r"[+-]?\d+\.\d"
    line = (
        rf"^Latency at batch size 2 \(cpu, \d+ threads?\): {number}\d → {number}\d ms"
        rf" \({number} %; half of 9 rounds within {number} to {number} %\)\.$"
    )
    assert re.search(line, out, re.M), out
    assert "MACs and FLOPs hide this cost: SE reads every branch map once more" in out


def narrow_vgg() -> torch.nn.Module:
    """The vgg11_bn of timm has 130 million weights."""
    return timm.models.vgg.VGG([8, "M", 16], norm_layer=torch.nn.BatchNorm2d, mlp_ratio=1 / 64)


def test_a_network_of_units_is_measured_too(call) -> None:
    status, out, _ = call("test_benchmark:narrow_vgg", "--img-size", "32", "--benchmark")
    assert status == 0
    assert "unit: after features.2" in out
    assert re.search(r"^Latency at batch size 1 \(cpu", out, re.M), out


def test_json_has_the_latency_only_where_it_was_measured(call) -> None:
    _, out, _ = call("test_resnet", "--json", "--benchmark")
    data = json.loads(out)
    latency = data.pop("latency")
    assert set(latency) == {
        *("device", "threads", "batch_size", "before_ms", "after_ms", "overhead", "rounds")
    }
    assert latency["device"] == "cpu"
    assert latency["before_ms"] > 0 < latency["after_ms"]
    assert latency["overhead"] == sorted(latency["overhead"])
    _, out, _ = call("test_resnet", "--json")
    assert json.loads(out) == data


@pytest.mark.parametrize("device", ["cuda:77", "nonsense", "meta"])
def test_a_device_that_is_not_there_is_an_error_of_one_line(call, device: str) -> None:
    status, out, err = call("test_resnet", "--benchmark", "--device", device)
    assert (status, out) == (1, "")
    assert re.fullmatch(rf"error: --device {device} cannot be used here \(.*\)\.\n", err)


@pytest.mark.parametrize(
    "args",
    [
        ["--benchmark", "--show", "layer1.0"],
        ["--benchmark", "--batch-size", "0"],
        ["--batch-size", "8"],
        ["--device", "cpu"],
    ],
    ids=" ".join,
)
def test_wrong_usage(call, args: list[str]) -> None:
    status, out, err = call("test_resnet", *args)
    assert (status, out) == (2, "")
    assert "Usage" in err


class Clock:
    """Seconds that pass only when a network says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def network(self, seconds: float) -> nn.Module:
        network = nn.Identity()
        network.register_forward_hook(lambda *_: self.passes(seconds))
        return network

    def passes(self, seconds: float) -> None:
        self.now += seconds


def test_the_overhead_is_that_of_the_second_network(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("se_inject.report.latency.time", clock)
    x = torch.empty(2, 3, 8, 8, device="meta")
    latency = compare_latency(clock.network(2.0), clock.network(3.0), ((x,), {}))
    assert latency.overhead == (0.5, 0.5, 0.5)
    assert (latency.before_ms, latency.after_ms) == (2000.0, 3000.0)


def test_the_second_network_is_that_with_se_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, forward = Clock(), SqueezeExcite.forward

    def slow(self: SqueezeExcite, *args: Any) -> torch.Tensor:
        clock.passes(1.0)
        return forward(self, *args)

    model = timm.create_model("test_resnet")
    plan = plan_se(model)
    model.conv1.register_forward_hook(lambda *_: clock.passes(10.0))
    monkeypatch.setattr(SqueezeExcite, "forward", slow)
    monkeypatch.setattr("se_inject.report.latency.time", clock)
    latency = measure_latency(plan)
    assert latency.before_ms == 10_000.0
    assert latency.after_ms == 10_000.0 + 1000.0 * len(plan.sites)


def test_the_model_stays_as_it_was_and_the_input_has_the_shape_of_the_plan(device: str) -> None:
    model = timm.create_model("test_resnet", in_chans=1)
    sizes = set()
    model.register_forward_pre_hook(lambda _, args: sizes.add(tuple(args[0].shape)))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_se(model, example_input=torch.empty(2, 1, 64, 48))
    latency = measure_latency(plan, batch_size=3, device=check_device(device))
    assert (3, 1, 64, 48) in sizes
    assert not any(edit_of(m) for m in model.modules())
    assert model.training
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert latency.rounds >= 9


def test_inputs_without_a_batch_and_of_whole_numbers_are_made_too() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 1)
            self.block = timm.models.resnet.BasicBlock(8, 8)

        def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return self.block(self.stem(x))[:, index]

    example = (torch.empty(2, 3, 16, 16), torch.tensor([1, 2]))
    plan = plan_se(Net(), r=4, example_input=example)
    assert measure_latency(plan, batch_size=5).batch_size == 5


def test_check_device_names_the_device() -> None:
    with pytest.raises(ArgumentError, match="--device cuda:77"):
        check_device("cuda:77")
    assert check_device("cpu") == torch.device("cpu")


def test_se_blocks_that_were_there_before_stay() -> None:
    model = inject_se(timm.create_model("resnet18"), include="layer1.*")
    state = dict(model.state_dict())
    example = torch.empty(1, 3, 32, 32)
    measure_latency(plan_se(model, include="layer2.*", example_input=example))
    assert model.state_dict().keys() == state.keys()
    assert edit_of(model.layer1[0])
    assert not edit_of(model.layer2[0])


class Pairs(torch.nn.Module):
    """Wants batches of two, of the dtype of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.block = timm.models.resnet.BasicBlock(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) != 2:
            raise ValueError("only batches of 2\nand this")
        return self.block(x)


def half_pairs() -> torch.nn.Module:
    return Pairs().bfloat16()


@pytest.mark.parametrize(
    ("args", "failure"),
    [
        (["test_resnet", "--batch-size", "10000000000"], r"RuntimeError: .*"),
        (["test_resnet", "--batch-size", "9" * 30], r"\w+: .*"),
        ([f"{__name__}:half_pairs", "--r", "1"], "ValueError: only batches of 2"),
    ],
    ids=["no memory", "no integer", "foreign error"],
)
def test_a_forward_that_fails_is_an_error_of_two_lines(call, args, failure: str) -> None:
    status, out, err = call(*args, "--benchmark")
    assert (status, out) == (1, "")
    first, second = err.splitlines()[-2:]
    assert re.fullmatch(
        rf"error: a forward at batch size \d+ on cpu failed \({failure}\)\.", first
    ), err
    assert second == "If memory ran out, take a smaller batch size or image."


def test_the_input_has_the_dtype_of_the_weights(call) -> None:
    status, out, _ = call(f"{__name__}:half_pairs", "--r", "1", "--benchmark", "--batch-size", "2")
    assert status == 0
    assert "Latency at batch size 2" in out


def test_a_slow_model_is_not_run_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_inject.report.latency._MIN_SECONDS", 1e9)
    monkeypatch.setattr("se_inject.report.latency._MAX_SECONDS", 0.0)
    plan = plan_se(timm.create_model("test_resnet"), example_input=torch.empty(1, 3, 32, 32))
    assert measure_latency(plan).rounds == 3
