"""benchmarks/evidence.py: the page is that of the committed files, and a list goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evidence import RESULTS, rate_of, run_all
from evidence_data import split_of
from evidence_list import RATE_SEED, SCALES, Sizes
from evidence_networks import plain, plain_wide, residual, residual_wide, units, units_wide
from evidence_page import build, difference
from torch import nn

from se_inject import inject_se

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_that_of_the_files() -> None:
    """Else: python benchmarks/evidence.py --page"""
    text, pictures = build(RESULTS)
    assert (DOCS / "evidence.md").read_text(encoding="utf-8") == text
    there = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "evidence").iterdir()}
    assert there == pictures


def test_the_files_are_of_the_list() -> None:
    """A run whose recipe is no longer that of the list would stand in the page beside others."""
    for scale in ("small", "full"):
        for experiment in SCALES[scale]():
            for arm in experiment.arms:
                for seed in experiment.seeds:
                    path = RESULTS / scale / experiment.folder / f"{arm.name}-{seed}.json"
                    if path.exists():
                        found = json.loads(path.read_text())
                        assert found["options"] == {**experiment.recipe, **arm.options}
                        sizes = experiment.sizes
                        assert (found["sizes"]["train"], found["test"]["images"]) == (
                            sizes.train,
                            sizes.test,
                        )
                        assert found["rate"] in experiment.rates


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_list_from_training_to_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiments = SCALES["quick"]()
    run_all(experiments, tmp_path / "quick")
    assert capsys.readouterr().out.count(".json") == 20
    run_all(experiments, tmp_path / "quick")  # all of it is there
    assert capsys.readouterr().out == ""
    text, pictures = build(tmp_path)
    for experiment in experiments:
        for arm in experiment.arms:
            assert f"| {arm.text} |" in text
    assert text.count("<svg") == 0
    assert pictures["forest-quick.svg"].count("<circle") == 3 + 2 + 3
    head, se = (
        json.loads((tmp_path / f"quick/lite0-digits/{arm}-0.json").read_text())
        for arm in ("head", "se")
    )
    assert (head["trainable"], se["trainable"]) == (650, 650 + 1928)
    assert (head["gates"], len(se["gates"]["blocks"])) == (None, 3)


def test_the_rate_is_that_of_the_best_accuracy_then_the_smaller_loss(tmp_path: Path) -> None:
    experiment = replace(SCALES["quick"]()[0], rates=(0.1, 0.2, 0.3))
    arm = experiment.arms[0]
    folder = tmp_path / experiment.folder
    folder.mkdir()
    for rate, accuracy, loss in ((0.1, 0.5, 1.0), (0.2, 0.7, 3.0), (0.3, 0.7, 2.0)):
        history = [{"val_acc": 0.9, "val_loss": 0.1}, {"val_acc": accuracy, "val_loss": loss}]
        (folder / f"{arm.name}-rate-{rate:g}.json").write_text(json.dumps({"history": history}))
    assert rate_of(experiment, arm, tmp_path) == 0.3


def test_no_image_of_the_test_is_seen_while_a_rate_is_chosen() -> None:
    sizes = Sizes(30, 20, 10)
    choosing = split_of("digits", sizes, RATE_SEED, test=False)
    assert set(choosing.parts) == {"train", "val"}
    reported = split_of("digits", sizes, 0, test=True)
    assert [len(reported.parts[name].labels) for name in ("train", "val", "test")] == [30, 20, 10]
    sources = [reported.parts[name].source for name in ("train", "val", "test")]
    assert sources[0] is sources[1] is not sources[2]
    assert set(reported.parts["train"].indices).isdisjoint(reported.parts["val"].indices)


def test_the_seeds_have_other_images_to_train_on_and_the_same_test() -> None:
    first, second, again = (
        split_of("digits", Sizes(30, 20, 10), seed, test=True).parts for seed in (0, 1, 0)
    )
    assert first["train"].indices == again["train"].indices
    assert first["train"].indices != second["train"].indices
    assert first["test"].indices == second["test"].indices


@pytest.mark.parametrize(
    ("build_base", "build_wide"),
    [(residual, residual_wide), (plain, plain_wide), (units, units_wide)],
)
def test_the_wider_network_has_as_many_parameters(
    build_base: Callable[[], nn.Module], build_wide: Callable[[], nn.Module]
) -> None:
    def size(network: nn.Module) -> int:
        head = network.get_submodule("fc")
        body = set(network.parameters()) - set(head.parameters())
        return sum(p.numel() for p in body) + 10 * head.in_features + 10

    with_se = size(inject_se(build_base(), example_input=torch.empty(1, 3, 32, 32)))
    assert size(build_wide()) == pytest.approx(with_se, rel=0.002)
    assert size(build_base()) < 0.98 * with_se


def test_the_interval_is_that_of_the_differences() -> None:
    def runs(*shares: float) -> dict[int, dict[str, dict[str, float]]]:
        return {seed: {"test": {"top1": share}} for seed, share in enumerate(shares)}

    found = difference(runs(0.52, 0.63, 0.71), runs(0.50, 0.60, 0.70, 0.9))
    # Differences of 2, 3 and 1 points: mean 2, standard error 1/sqrt(3), Student's t 4.3027.
    assert found.mean == pytest.approx(2)
    assert found.low == pytest.approx(2 - 4.3027 / 3**0.5, abs=1e-3)
    assert (found.verdict, found.seeds) == ("within the noise", 3)
    assert difference(runs(0.52, 0.53, 0.54), runs(0.50, 0.50, 0.50)).verdict == "better"
    assert difference(runs(0.50, 0.50, 0.50), runs(0.52, 0.53, 0.54)).verdict == "worse"
