"""Gates made so that the answer is known: what the statistics say, and what is folded."""

import copy
import io
import itertools
import sys
from typing import Any

import pytest
import timm
import torch
from blocks import Plain
from helpers import open_gates, randomize
from rich.console import Console
from torch import Tensor, nn

from se_inject import (
    ArgumentError,
    NoSiteError,
    SqueezeExcite,
    UnsupportedModelError,
    inject_se,
    load_se,
    remove_se,
    save_se,
)
from se_inject.edit.block_class import edit_of
from se_inject.gates import (
    advice,
    fold_se,
    gate_statistics,
    gates_table,
    prune_se,
    statistics_dict,
    verdict,
)
from se_inject.gates.advice import globs
from se_inject.gates.pictures import class_curves, heat_map, write_pictures

X = torch.randn(2, 6, 16, 8, 8, generator=torch.Generator().manual_seed(0))  # two batches
EXACT = torch.tensor([1.0, 0.5, 2.0, 0.25, 4.0, 0.0, 1.0, 8.0] * 2)


def network(**options: Any) -> nn.Module:
    """Four blocks with SE, then a head: "0" to "3"."""
    layers = [*(Plain() for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = randomize(nn.Sequential(*layers, nn.Linear(16, 5))).eval()
    return inject_se(model, example_input=X[0], divisor=4, **options)


@torch.no_grad()
def constant(layer: SqueezeExcite, gate: Tensor) -> None:
    """Give a block with the gate ``relu(1 + z)`` the same gate for every image."""
    layer.fc2.weight.zero_()
    layer.fc2.bias.copy_(gate - 1)


@torch.no_grad()
def biased(layer: SqueezeExcite, z: float) -> None:
    layer.fc2.weight.zero_()
    layer.fc2.bias.fill_(z)


# --- what the statistics and the advice say ----------------------------------------------------


def by_class(classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images that are the same for all of a class."""
    labels = torch.arange(24) % classes
    return torch.randn(classes, 16, 8, 8)[labels], labels


def test_known_gates_are_told_apart() -> None:
    model = network()  # 2 * sigmoid; block 0 stays idle
    open_gates(model[3])
    biased(model[1].se, 0.3)
    biased(model[2].se, 30.0)
    with torch.no_grad():
        model[2].se.fc2.bias[:4] = -30.0
    x, y = by_class()
    found = gate_statistics(model, [(x[:10], y[:10]), (x[10:], y[10:])], list("abcd"))
    idle, fixed, shut, varies = found.blocks
    assert (idle.mean, idle.spread, idle.idle, idle.constant, idle.deviation) == (1, 0, 1, 1, 0)
    assert fixed.mean == pytest.approx(2 / (1 + torch.exp(torch.tensor(-0.3)).item()))
    assert (fixed.spread, fixed.idle, fixed.constant, fixed.deviation) == (0, 0, 1, 0)
    assert (fixed.near_zero, fixed.near_maximum) == (0, 0)
    assert (shut.near_zero, shut.near_maximum, shut.idle) == (0.25, 0.75, 0)
    assert varies.idle < 1
    assert varies.constant < 1
    assert varies.class_share == pytest.approx(1, abs=1e-6)
    assert varies.within == pytest.approx(0, abs=1e-5)
    assert varies.between == pytest.approx(varies.spread)
    assert varies.spread > 0.01
    assert (idle.class_share, fixed.class_share) == (None, None)
    assert [verdict(b) for b in found.blocks] == ["idle", "constant", "constant", "by class"]
    said = advice(found)
    assert said.startswith("3 of 4 SE blocks are idle or constant over 24 images. fold_se could")
    assert "fold 0, 1, 2 into" in said
    assert "no gate there would change at all" in said
    data = statistics_dict(found)
    assert [block["gates"] for block in data["blocks"]] == [verdict(b) for b in found.blocks]
    assert data["advice"] == said


def test_labels_of_chance_explain_nothing() -> None:
    model = network()
    open_gates(model)
    x, y = torch.randn(400, 16, 8, 8), torch.arange(400) % 100  # four images a class
    found = gate_statistics(model, [(x, y)], 100)
    # Of the plain variance, a quarter would be between classes by chance.
    assert all(block.class_share < 0.1 for block in found.blocks)
    assert [verdict(block) for block in found.blocks] == ["by image"] * 4
    assert advice(found).startswith("None of 4 SE blocks is idle or constant over 400 images")
    alone = gate_statistics(model, [(x[:5], torch.arange(5))], 5)  # one image a class
    assert alone.blocks[0].class_share is None


def test_a_saturated_gate_that_varies_is_not_constant() -> None:
    model = network(gate="hard_sigmoid")
    with torch.no_grad():  # each gate is 0 or 2, depending on the image
        model[0].se.fc1.weight.normal_(0, 10)
        model[0].se.fc2.weight.normal_(0, 1e4)
    signs = torch.tensor([1.0, -1.0] * 6)[:, None, None, None]
    found = gate_statistics(model, [signs * torch.randn(16, 1, 1).expand(16, 8, 8)])["0"]
    assert found.channel_low.min() == 0
    assert found.channel_high.max() == 2
    assert found.constant < 1
    assert found.near_zero + found.near_maximum < 1
    assert verdict(found) == "by image"


def test_nearly_idle_and_just_not() -> None:
    for z, idle in ((0.0199, 1), (0.0201, 0), (-0.0199, 1), (-0.0201, 0)):
        model = network()
        biased(model[0].se, z)  # 2 * sigmoid(z) is about 1 + z / 2
        assert gate_statistics(model, list(X))["0"].idle == idle


def test_all_idle_is_a_network_that_was_not_trained() -> None:
    said = advice(gate_statistics(network(), list(X)))
    assert said.startswith("All of 4 SE blocks are idle over 12 images")


def test_a_gate_that_varies_over_positions_only_is_not_constant() -> None:
    model = network(squeeze="none")
    open_gates(model)
    found = gate_statistics(model, [X[0, :1]])  # one image: no spread over images
    assert all(block.spread == 0 for block in found.blocks)
    assert all(block.constant < 1 for block in found.blocks)
    assert all(block.by_position for block in found.blocks)


@pytest.mark.parametrize("classes", [None, 3])
def test_the_table_has_a_row_a_block(classes: int | None) -> None:
    labels = torch.arange(12).view(2, 6) % 3
    found = gate_statistics(network(), list(zip(X, labels, strict=True)), classes)
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(gates_table(found))
    lines = console.export_text().splitlines()
    assert sum(line.split()[-1:] == ["idle"] and " 100 " in line for line in lines) == 4
    assert any("within" in line for line in lines) == (classes is not None)
    assert all(len(line.rstrip()) <= 80 for line in lines)


def test_globs_name_whole_stages_only() -> None:
    names = ["a.0", "a.1", "b.0", "b.1", "c"]
    assert globs(["a.0", "b.0", "b.1", "c"], names) == ["a.0", "b.*", "c"]
    assert globs(names, names) == ["a.*", "b.*", "c"]
    assert globs([""], ["", "x.se"]) == ["(model)"]


# --- folding -----------------------------------------------------------------------------------


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X.flatten(0, 1))


@pytest.mark.parametrize("squeeze", ["avg", "max", "none"])
def test_powers_of_two_fold_to_the_last_bit(squeeze: Any) -> None:
    model = network(gate="relu", squeeze=squeeze)
    for i in (0, 2, 3):
        constant(model[i].se, EXACT.roll(i))
    open_gates(model[1])
    torch.nn.init.ones_(model[1].se.fc2.bias)  # a relu that is shut for all images is constant too
    before = run(model)
    keys = [key for key in model.state_dict() if not key.startswith(("0.se", "2.se", "3.se"))]
    folding = fold_se(model, list(X))
    assert torch.equal(run(model), before)
    assert folding.folded == ("0", "2", "3")
    assert list(folding.kept) == ["1"]
    assert "leave their mean" in folding.kept["1"]
    assert folding.change.largest == folding.change.relative == folding.change.answers == 0
    assert folding.change.images == 12
    assert folding.params == 3 * (2 * 16 * 4 + 4 + 16)
    assert list(model.state_dict()) == keys
    assert [type(block) for block in model[:4]] == [
        Plain,
        edit_of(model[1]).block_class,
        Plain,
        Plain,
    ]
    assert set(folding.changed) == {f"{i}.norm.{w}" for i in (0, 2, 3) for w in ("weight", "bias")}


def test_other_constants_fold_up_to_rounding() -> None:
    model = network().double()
    for i, block in enumerate(model[:4]):
        with torch.no_grad():
            block.se.fc2.bias.normal_(0, 1 + i)
    x = list(X.double())
    before = model(x[0])
    folding = fold_se(model, x, tolerance=0)
    assert len(folding.folded) == 4
    torch.testing.assert_close(model(x[0]), before, rtol=1e-12, atol=1e-12)
    assert 0 < folding.change.largest < 1e-12
    assert "Folded 4 of 4 blocks with SE: 0, 1, 2, 3" in str(folding)


def test_what_is_nearly_constant_folds_as_far_as_asked() -> None:
    model = network()
    with torch.no_grad():
        model[0].se.fc2.weight.normal_(0, 1e-2)
    deviation = gate_statistics(model, list(X))["0"].deviation
    assert 0 < deviation < 0.01
    exact, loose = copy.deepcopy(model), copy.deepcopy(model)
    assert fold_se(exact, list(X), tolerance=0).folded == ("1", "2", "3")
    assert torch.equal(run(exact), run(model))
    folding = fold_se(loose, list(X))
    assert folding.folded == ("0", "1", "2", "3")
    greatest = (run(loose) - run(model)).abs().max().item()
    assert folding.change.largest == pytest.approx(greatest, rel=1e-3)
    assert folding.change.relative == pytest.approx(greatest / run(model).abs().max().item(), 1e-3)
    assert greatest > 0


@pytest.mark.parametrize("name", ["resnet18", "test_mambaout", "test_convnext", "mobilenetv2_035"])
def test_folding_in_networks_of_others(name: str) -> None:
    model = inject_se(randomize(timm.create_model(name)).eval()).double()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, SqueezeExcite):
                layer.fc2.bias.normal_()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    before = model(x)
    folding = fold_se(model, [x])
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-9)
    foldable = name != "test_convnext"  # a permute lies between the last layer and the SE block
    assert bool(folding.folded) == foldable
    assert bool(folding.kept) != foldable
    assert any(isinstance(m, SqueezeExcite) for m in model.modules()) != foldable


def test_a_map_that_others_read_takes_no_factor_but_an_idle_block_goes() -> None:
    model = network(placement="pre", gate="relu")  # the shortcut reads the map too
    constant(model[2].se, EXACT)
    before = run(model)
    folding = fold_se(model, list(X))
    assert torch.equal(run(model), before)
    assert folding.folded == ("0", "1", "3")
    assert "no norm or convolution that feeds it alone" in folding.kept["2"]
    assert not folding.changed


def test_include_and_exclude() -> None:
    model = network()
    folding = fold_se(model, list(X), include=["0", "1"], exclude="1")
    assert folding.folded == ("0",)
    assert folding.kept == dict.fromkeys("123", "excluded by the user")
    with pytest.raises(ArgumentError, match="matches no block with an SE block"):
        fold_se(model, list(X), include="0")


@pytest.mark.parametrize("act", [fold_se, lambda *a, **k: prune_se(*a, max_change=1.0, **k)])
def test_a_loader_for_one_pass_and_other_mistakes_change_nothing(act: Any) -> None:
    model = network(gate="relu")
    constant(model[0].se, EXACT)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match="only once"):
        act(model, iter(list(X)))
    with pytest.raises(RuntimeError):
        act(model, [X[0], X[1, :, :3]])
    with pytest.raises(NoSiteError):
        act(remove_se(copy.deepcopy(model)), list(X))
    with pytest.raises(UnsupportedModelError, match="compiled"):
        act(torch.compile(model), list(X))
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_limits_below_zero(value: float) -> None:
    with pytest.raises(ArgumentError, match="tolerance"):
        fold_se(network(), list(X), tolerance=value)
    with pytest.raises(ArgumentError, match="max_change"):
        prune_se(network(), list(X), max_change=value)


def test_what_was_folded_in_part_is_saved_and_loaded(tmp_path: Any) -> None:
    model = network(gate="relu")
    base = remove_se(copy.deepcopy(model))
    constant(model[0].se, EXACT)
    open_gates(model[1])
    folding = fold_se(model, list(X))
    save_se(model, tmp_path / "se.safetensors", extra=list(folding.changed))
    assert torch.equal(run(load_se(base, tmp_path / "se.safetensors")), run(model))


# --- pruning -----------------------------------------------------------------------------------


def pruned(limit: float) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        for block, scale in zip(model[:4], (0.3, 0.01, 3.0, 0.1), strict=True):
            block.se.fc2.weight.normal_(0, scale)
    before = run(model)
    folding = prune_se(model, list(X), max_change=limit)
    change = (run(model) - before).abs().max() / before.abs().max()
    assert folding.change.relative == pytest.approx(change.item(), rel=1e-3, abs=1e-7)
    return model, folding


def test_pruning_begins_with_what_varies_least_and_keeps_to_the_limit() -> None:
    folded = []
    for limit in (0.0, 1e-3, 1e-2, 3e-2, 10.0):
        _, folding = pruned(limit)
        assert folding.change.relative <= limit
        assert all("outputs change by up to" in why for why in folding.kept.values())
        folded.append(folding.folded)
    assert folded[0] == ()
    assert folded[-1] == ("0", "1", "2", "3")
    order = "1302"  # by the scale of the weights
    assert all(set(f) == set(order[: len(f)]) for f in folded)
    assert [len(f) for f in folded] == sorted(len(f) for f in folded)
    assert len({len(f) for f in folded}) > 2


# --- removing some -----------------------------------------------------------------------------


def test_some_se_blocks_are_removed() -> None:
    model = network()
    open_gates(model)
    kept = model[2].se
    assert remove_se(model, include=["0", "2", "3"], exclude="2") is model
    assert [hasattr(block, "se") for block in model[:4]] == [False, True, True, False]
    assert model[2].se is kept
    assert type(model[0]) is Plain
    before = run(model)
    assert not torch.equal(run(remove_se(copy.deepcopy(model), include="1")), before)
    with pytest.raises(ArgumentError, match="exclude='0' matches no block with an SE block"):
        remove_se(model, exclude="0")
    remove_se(model)
    with pytest.raises(NoSiteError):
        remove_se(model, include="1")
    assert not list(
        itertools.chain.from_iterable(m.parameters() for m in model if hasattr(m, "se"))
    )


# --- pictures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 3, 1000])
def test_pictures_are_written_and_name_what_they_show(tmp_path: Any, classes: int | None) -> None:
    model = network()
    open_gates(model)
    labels = torch.arange(12).view(2, 6) % 3
    names = classes and [f"class number {i}" for i in range(classes)]
    found = gate_statistics(model, list(zip(X, labels, strict=True)), names)
    written = {path.name: path for path in write_pictures(found, tmp_path / "new")}
    pictures = ["gates-heat-map", "gates-spread", *(["gates-classes"] if classes else [])]
    assert set(written) == {f"{p}.{kind}" for p in pictures for kind in ("png", "svg")}
    for name, path in written.items():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    assert ">3<" in written["gates-heat-map.svg"].read_text()  # the last block
    if classes:
        text = written["gates-classes.svg"].read_text()
        assert all(f">class number {i}<" in text for i in range(3))  # and none without images
        assert ">class number 3<" not in text
    again = write_pictures(found, tmp_path / "again")
    assert all(path.read_bytes() == written[path.name].read_bytes() for path in again)


def test_curves_of_chosen_classes() -> None:
    model = network()
    open_gates(model)
    x, y = by_class()
    found = gate_statistics(model, [(x, y)], ["ant", "bee", "cat", "dog"])
    figure = class_curves(found, ["cat", "ant"])
    assert len(figure.axes) == 4
    for axes, block in zip(figure.axes, found.blocks, strict=True):
        order = block.channel_mean.argsort()
        cat, ant, every = (torch.as_tensor(line.get_ydata()) for line in axes.lines)
        assert torch.equal(cat, block.class_means[2][order])
        assert torch.equal(ant, block.class_means[0][order])
        assert torch.equal(every, block.channel_mean[order])
    with pytest.raises(ArgumentError, match=r"no class 'bea'. Near names: 'bee'"):
        class_curves(found, ["bea"])
    with pytest.raises(ArgumentError, match="by class"):
        class_curves(gate_statistics(model, [x]))


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gate_statistics(network(), list(X))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"se-inject\[viz\]"):
        heat_map(found)
