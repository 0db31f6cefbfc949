"""The notebooks in ``examples/`` run from their first cell to their last."""

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("IPython", reason="needs ipykernel (extra dev)")
nbformat = pytest.importorskip("nbformat", reason="needs nbclient (extra dev)")

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
Here = Callable[..., tuple[int, str, str]]


def cells(name: str) -> list[Any]:
    found: list[Any] = nbformat.read(FOLDER / name, as_version=4).cells
    return [cell for cell in found if cell.cell_type == "code"]


def run_cells(name: str, here: Here) -> dict[str, Any]:
    """Run the cells in this process, as IPython would: a kernel of its own imports torch anew.

    A line that begins with an exclamation mark is a command of ours, which also runs here.
    """
    from IPython.core.inputtransformer2 import TransformerManager

    def system(line: str) -> None:
        program, *arguments = shlex.split(line)
        assert program == "se-inject"
        status, out, err = here(*arguments)
        assert status == 0, err
        print(out)

    names: dict[str, Any] = {"get_ipython": lambda: SimpleNamespace(system=system)}
    for number, cell in enumerate(cells(name)):
        source = TransformerManager().transform_cell(cell.source)
        exec(compile(source, f"{name}, cell {number}", "exec"), names)
    return names


def test_a_network_is_inspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Here
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = run_cells("inspect.ipynb", here)
    out = capsys.readouterr().out
    assert out.count("equal to the last bit: True") == 2
    assert "False" not in out
    assert "4 sites, 0 additions left alone" in out
    assert "SqueezeExcite" in names["folder"].joinpath("block.svg").read_text()
    # Training has moved the gates away from 1.
    assert all((gate != 1).any() for gate in names["gates"].values())
    assert {block.block for block in names["statistics"].blocks} == set(names["gates"])
    assert "by class" in out


def test_a_folder_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], here: Here
) -> None:
    monkeypatch.chdir(tmp_path)
    run_cells("finetune.ipynb", here)
    out = capsys.readouterr().out
    assert "equal to the last bit: True" in out
    assert "page.html" in out
    assert "validation accuracy" in out  # of finetune
    assert "precision" in out  # of evaluate
    found = re.findall(r"(\w+) stripes: lying (\S+), standing (\S+)", out)
    assert [kind for kind, *_ in found] == ["lying", "standing"]
    assert [float(lying) > 0.5 for _, lying, _ in found] == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_kept(name: str) -> None:
    """They would make the repository large, and every run would change them."""
    kept = [cell for cell in cells(name) if cell.outputs or cell.execution_count is not None]
    assert kept == []


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_runs_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Jupyter does it: in a process of its own, whose shell finds ``se-inject``."""
    client = pytest.importorskip("nbclient", reason="needs nbclient (extra dev)")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(FOLDER / name, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "equal to the last bit: True" in text
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds & {"image/svg+xml", "image/png"}
