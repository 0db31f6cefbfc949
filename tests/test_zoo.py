"""The coverage table, on a few families."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command
from processes import CONTEXT

from se_inject.report import zoo
from se_inject.report.zoo import families, family_of, model_names, survey


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that have imported torch and timm already: each would take seconds for it."""
    monkeypatch.setattr(zoo.multiprocessing, "get_context", lambda _: CONTEXT)


def test_names_and_families() -> None:
    names = model_names("all", "*resnet50")
    assert {"resnet50", "seresnet50", "torchvision/resnet50"} <= set(names)
    assert family_of("resnet50") == "timm resnet"
    assert family_of("torchvision/fcos_resnet50_fpn") == "torchvision detection.fcos"


def test_a_family_is_the_sum_of_its_models() -> None:
    rows = families([survey(name) for name in ("resnet18", "seresnet18", "vit_tiny_patch16_224")])
    resnet, vit = rows
    assert (resnet.models, resnet.injectable, resnet.sites, resnet.failed) == (2, 1, 8, 0)
    assert dict(resnet.skipped) == {"the branch already has channel attention": 8}
    assert (vit.models, vit.injectable, vit.failed) == (1, 0, 0)


def test_a_model_that_cannot_be_planned_is_a_failure_with_its_error() -> None:
    result = survey("torchvision/quantized_resnet18")
    assert result.error is None  # the float model that quantization starts from
    assert result.sites == 8


@pytest.mark.usefixtures("forked")
def test_the_command_writes_the_table(tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    result = command("zoo", "--filter", "test_*resnet*", "--library", "timm", "--output", str(page))
    assert result.returncode == 0, result.stderr
    assert re.search(r"^timm resnet +1 +1 +4 ", result.stdout, re.M)
    text = page.read_text()
    assert "| timm resnet | 1 | 1 | 4 |" in text
    assert "None." in text


@pytest.mark.usefixtures("forked")
def test_json_is_one_object() -> None:
    result = command("zoo", "--filter", "resnet18", "--library", "timm", "--json")
    data = json.loads(result.stdout)
    assert data["models"][0]["model"] == "resnet18"
    assert data["families"][0]["sites"] == 8


def test_a_filter_that_matches_nothing_is_an_error() -> None:
    result = command("zoo", "--filter", "nothing*")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: --filter 'nothing*' matches no model of all.\n"


@pytest.mark.parametrize(("name", "sites"), [("hgnetv2_b0", 5), ("resnet18", 0)])
def test_units_beside_branches_are_counted_where_they_are_asked_for(name: str, sites: int) -> None:
    """Units add one to five sites to a few residual networks."""
    assert survey(name, "units").units == sites


KILLED = """
from se_inject.report.zoo import survey_all
if __name__ == "__main__":
    for entry in survey_all(["resnet18", "resnet34"] * 50, workers=2):
        print(entry.model, flush=True)
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline().startswith("resnet")
        parent.kill()
        parent.communicate(timeout=1200)  # the end of a pipe that the workers too can write to
