"""Bars by block, the diagram of a block, and what a folded network saves."""

import copy
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from se_inject import ArgumentError, NoSiteError, inject_se, plan_se, remove_se
from se_inject.gates import fold_se
from se_inject.report import diagram
from se_inject.report.count import count_costs
from se_inject.report.diagram import draw_block
from se_inject.report.plot import plot_costs, time_sites
from se_inject.report.saved import count_injected, example_of, measure_savings


def network(name: str = "resnet18") -> nn.Module:
    return timm.create_model(name)


@pytest.mark.parametrize("squeeze", ["avg", "none"])
@pytest.mark.parametrize("name", ["resnet18", "test_mambaout"])
def test_a_network_with_se_blocks_counts_as_it_was_planned(name: str, squeeze: Any) -> None:
    plan = plan_se(network(name), squeeze=squeeze)
    planned = count_costs(plan).augmented
    assert count_injected(plan.apply(), plan.example) == planned


def test_savings_are_what_the_blocks_cost() -> None:
    model = network()
    plan = plan_se(model)
    plan.apply()
    before = copy.deepcopy(model)
    fold_se(model, [torch.randn(2, 3, 64, 64)], include="layer4.*")
    saved = measure_savings(before, model)
    gone = [site for site in plan.sites if site.block.startswith("layer4")]
    assert saved.before.params - saved.after.params == sum(site.params for site in gone)
    assert saved.before.macs - saved.after.macs == sum(site.macs for site in gone)
    assert saved.blocks == (8, 6)
    assert str(saved).startswith(f"8 SE blocks → 6, {sum(s.params for s in gone):,} parameters and")
    assert "latency" not in saved.to_dict()
    nothing = measure_savings(before, remove_se(copy.deepcopy(before)))
    assert nothing.before.macs - nothing.after.macs == plan.added.macs
    assert nothing.blocks == (8, 0)
    with pytest.raises(NoSiteError):
        example_of(remove_se(model))


def test_latency_of_both_is_measured_on_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_inject.report.latency._MIN_SECONDS", 0.0)
    monkeypatch.setattr("se_inject.report.latency._MIN_ROUNDS", 3)
    model = inject_se(network("test_resnet")).train()
    saved = measure_savings(model, remove_se(copy.deepcopy(model)), benchmark=True, batch_size=2)
    assert saved.latency is not None
    assert saved.latency.before_ms > 0
    assert saved.latency.batch_size == 2
    assert "ms a batch of 2" in str(saved)
    assert model.training


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_bars_name_the_blocks(tmp_path: Path, suffix: str) -> None:
    plan = plan_se(network("test_resnet"))
    times = time_sites(plan)
    assert set(times) == {site.name for site in plan.sites}
    assert all(value >= 0 for value in times.values())
    path = plot_costs(plan, tmp_path / f"bars{suffix}", times)
    if suffix == ".svg":
        text = path.read_text()
        assert all(f">{site.block}<" in text for site in plan.sites)
        assert ">squeeze<" in text
        assert "milliseconds" in text
        assert "milliseconds" not in plot_costs(plan, path).read_text()
    else:
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ArgumentError, match=r"\.svg or \.png"):
        plot_costs(plan, tmp_path / "bars.pdf")


@pytest.mark.parametrize("tool", ["matplotlib", "dot"])
def test_the_diagram_shows_both_forwards(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tool == "matplotlib":
        monkeypatch.setattr(diagram.shutil, "which", lambda name: None)
    elif not shutil.which("dot"):
        pytest.skip("graphviz is not installed")
    plan = plan_se(network("resnet50"))
    text = draw_block(plan, "layer1.0", tmp_path / "block.svg").read_text()
    assert "layer1.0: Bottleneck" in text
    assert "SEBottleneck" in text
    assert "SqueezeExcite and sum" in text
    assert "excite: 256→16→256" in html.unescape(text)
    assert "gate: 2 * sigmoid" in text
    assert "branch × gate + shortcut" in html.unescape(text)
    assert text.count("conv3") >= 2
    assert "Identity" not in text  # drop_block and aa, which do nothing
    with pytest.raises(ArgumentError, match=r"block 'layer1\.9' gets no SE block"):
        draw_block(plan, "layer1.9", tmp_path / "block.svg")
    with pytest.raises(ArgumentError, match=r"\.svg or \.png"):
        draw_block(plan, "layer1.0", tmp_path / "block.gif")


def test_dot_is_given_each_box_and_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no graphviz, a program that repeats its input stands for it."""
    fake = tmp_path / "dot"
    fake.write_text("#!/bin/sh\ncat\n")
    fake.chmod(0o755)
    monkeypatch.setattr(diagram.shutil, "which", lambda name: str(fake))
    source = draw_block(plan_se(network()), "layer1.0", tmp_path / "block.svg").read_text()
    assert source.startswith("digraph {")
    assert source.count("subgraph cluster_") == 2
    assert '"1 bn2" -> "1 se"' in source
    assert '"0 bn2" -> "0 iadd"' in source or '"0 bn2" -> "0 add"' in source
    assert source.count('fillcolor="#f4b183"') == 1
    assert source.index("cluster_1") < source.index("cluster_0")  # graphviz stacks them upwards
    fake.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    with pytest.raises(ArgumentError, match="dot cannot draw the block"):
        draw_block(plan_se(network()), "layer1.0", tmp_path / "other.svg")
    assert not (tmp_path / "other.svg").exists()


# --- the options of the report ----------------------------------------------------------------


def test_plot_of_the_report(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("se_inject.report.latency._MIN_SECONDS", 0.0)
    path = tmp_path / "cost.svg"
    status, out, _ = call("test_resnet", "--plot", str(path), "--json")
    assert status == 0
    assert len(json.loads(out)["sites"]) == 4
    assert "milliseconds" not in path.read_text()
    assert call("test_resnet", "--plot", str(path), "--benchmark")[0] == 0
    assert "milliseconds" in path.read_text()


def test_diagram_of_the_report(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagram.shutil, "which", lambda name: None)
    path = tmp_path / "block.svg"
    status, out, _ = call("vgg11_bn", "--diagram", "features.2", "--output", str(path))
    assert (status, out) == (0, f"The block before and after: {path}\n")
    assert "SEReLU" in path.read_text()


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["--diagram", "layer1.0"], 2, "--diagram BLOCK needs --output FILE"),
        (["--output", "x.svg"], 2, "and --output needs --diagram"),
        (["--json", "--diagram", "a", "--output", "x.svg"], 2, "--json and --diagram exclude"),
        (["--plot", "x.svg", "--show", "layer1.0"], 2, "--plot and --show exclude each other"),
        (["--plot", "x.pdf"], 1, "--plot x.pdf must end in .svg or .png"),
        (["--diagram", "no", "--output", "x.svg"], 1, "block 'no' gets no SE block"),
    ],
)
def test_pictures_that_cannot_be(call, args: list[str], status: int, message: str) -> None:
    found, out, err = call("test_resnet", *args)
    assert (found, out) == (status, "")
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())
