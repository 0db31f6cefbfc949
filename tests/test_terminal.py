"""The command line on narrow terminals, without colours, in completions and for programs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import CONTEXT, ended

from se_inject import inject_se, save_se
from se_inject.models.names import load_model

Call = Callable[..., tuple[int, str, str]]
PROGRAM = "import sys; sys.argv[0] = 'se-inject'; from se_inject.cli.app import main; main()"
COMMANDS = ("report", "zoo", "export", "finetune", "evaluate", "predict", "gates", "prune", "page")


@pytest.mark.parametrize("width", [40, 60])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_is_whole_on_a_narrow_terminal(
    command: str, width: int, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    status, out, err = call(command, "--help")
    assert (status, err) == (0, "")
    assert "--help" in out
    assert "…" not in out  # no option is cut
    assert "│" not in out
    # What is longer than its column and cannot be broken: a list of values.
    wide = [line for line in out.splitlines() if len(line) > max(width, 50)]
    assert [line for line in wide if not re.match(r" +--?[\w-]+ .*[|=,]", line)] == []


def test_a_wide_terminal_after_a_narrow_one_has_frames_again(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "│" not in call("page", "--help")[1]
    monkeypatch.setenv("COLUMNS", "100")
    assert "│" in call("page", "--help")[1]


def test_words_of_the_zoo_are_whole_on_a_narrow_terminal(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    # A worker that has imported torch and timm already.
    monkeypatch.setattr("multiprocessing.get_context", lambda _: CONTEXT)
    status, out, _ = call("zoo", "--library", "timm", "--filter", "test_resnet", "--workers", "1")
    assert status == 0
    assert "injectable" in out
    assert "timm resnet" in out


@pytest.mark.parametrize("args", [["test_resnet"], ["report", "--help"]])
def test_no_color_turns_colours_off(args: list[str]) -> None:
    env = {"FORCE_COLOR": "1", "NO_COLOR": "1", "TERM": "xterm-256color"}
    done = ended(PROGRAM, *args, env=env)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", out) for code in found.split(";")}
    assert codes  # it is told to write for a terminal
    assert codes <= {"", "0", "1", "2", "3", "4"}  # bold, faint, italic and underlined alone


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("se-inject fine", "finetune"),
        ("se-inject finetune --freeze", "--freeze-epochs"),
        ("se-inject resnet50 --plac", "--placement"),  # of the report, which is not named
    ],
)
def test_a_shell_completes_commands_and_options(words: str, expected: str) -> None:
    env = {
        "_SE_INJECT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    assert ended(PROGRAM, env=env).stdout.split() == [expected]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_speak_json(command: str, call: Call) -> None:
    assert "--json" in call(command, "--help")[1]


def test_export_says_in_json_what_it_wrote(call: Call, tmp_path: Path) -> None:
    model = load_model("test_resnet")
    weights, output = tmp_path / "se.safetensors", tmp_path / "net.pt2"
    save_se(inject_se(model), weights, extra="*")
    args = ("--weights", str(weights), "--output", str(output), "--format", "torch-export")
    status, out, _ = call("export", "test_resnet", *args, "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["file"], found["format"]) == (str(output), "torch-export")
    assert "torch.export.load" in found["load"]


def test_finetune_and_page_say_in_json_where_things_are(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("se_inject.finetune.after.page.write_page", lambda *_, **__: tmp_path / "p")
    summary = {"arms": {}, "verdict": "none"}
    monkeypatch.setattr("se_inject.finetune.runs.trainer.start", lambda *_, **__: summary)
    run = tmp_path / "run"
    status, out, _ = call(
        "finetune", "test_resnet", "--data", "digits", "--output", str(run), "--json"
    )
    assert status == 0
    assert json.loads(out) == {**summary, "run": str(run), "page": str(tmp_path / "p")}
    status, out, _ = call("page", str(run), "--json")
    assert (status, json.loads(out)) == (0, {"page": str(tmp_path / "p")})
