"""The command line, mostly in this process; once each as a real process."""

import dataclasses
import functools
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from commands import command
from processes import ended
from typer.testing import CliRunner, Result

import se_inject
from se_inject.cli import app as cli
from se_inject.cli.options import Given, Only, expand
from se_inject.finetune.options.settings import Settings
from se_inject.models.names import load_model
from se_inject.plan.injection import Injection
from se_inject.plan.injection import option as knob
from se_inject.plan.planner import make_plan
from se_inject.report.count import count_costs

ROOT = Path(__file__).parents[1]


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``se-inject ARGS`` as a user's shell runs it, in a pipe."""
    return subprocess.run(
        [sys.executable, "-m", "se_inject", *args],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )


def numbers(line: str) -> list[int]:
    """The figures with thousands separators at the end of a table row."""
    return [int(v.replace(",", "")) for v in re.findall(r"(?<![\w×→])\d[\d,]*(?![\w×→.])", line)]


# --- the report --------------------------------------------------------------------------------


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that keeps what it gave for the same first argument and equal others."""
    kept: dict[tuple[int, str], tuple[Any, Any]] = {}

    def call(first: Any, *others: Any) -> Any:
        key = id(first), repr(others)
        if key not in kept:
            kept[key] = first, function(first, *others)  # the first lives on, so its id stays its
        return kept[key][1]

    return call


LOAD, PLAN, COUNT = functools.cache(load_model), once(make_plan), once(count_costs)


@pytest.fixture
def planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are planned and counted once for all tests of how their tables are printed."""
    monkeypatch.setattr("se_inject.models.names.load_model", LOAD)
    monkeypatch.setattr("se_inject.plan.planner.make_plan", PLAN)
    monkeypatch.setattr("se_inject.report.count.count_costs", COUNT)


def test_the_report_of_resnet50(call) -> None:
    status, out, err = call("resnet50", "--r", "16")
    assert (status, err) == (0, "")
    assert (
        "resnet50: 25.56 M → 28.09 M parameters (+9.9 %), 4.089 → 4.103 GMACs (+0.33 %)"
        in out.splitlines()
    )
    assert "1 MAC = 2 FLOPs; the papers' GFLOPs are GMACs" in out
    assert "8.178 → 8.205 G" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("name", ["resnet50", "resnet152", "mobilenetv2_100", "hrnet_w18_small"])
def test_columns_sum_to_the_printed_totals(call, name: str) -> None:
    _, out, _ = call(name)
    table = out.split("left alone")[0].splitlines()
    rows = [numbers(line)[-4:] for line in table if re.search(r"\d→\d", line)]
    total = next(numbers(line)[-4:] for line in table if re.match(r"\d+ sites", line))
    assert len(rows) >= 4
    assert [sum(column) for column in zip(*rows, strict=True)] == total


@pytest.mark.usefixtures("planned_once")
@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", ["resnet50", "resnet152", "hrnet_w18_small"])
def test_figures_are_whole_at_every_width(
    call, monkeypatch: pytest.MonkeyPatch, name: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = call(name)
    table = out.split("left alone")[0]
    assert "block" in table
    assert not re.search(r"\d…(\s|$)", table)
    if width >= 80:
        lines = table.splitlines()[: -1 if "parameters" not in table else None]
        assert all(len(line) <= width for line in lines if "parameters" not in line)


def test_a_second_site_of_a_block_is_numbered(call) -> None:
    _, out, _ = call("caformer_s18")
    assert re.search(r"^stages\.0\.blocks\.0 +64×56×56", out, re.M)
    assert re.search(r"^stages\.0\.blocks\.0 #2 +64×56×56", out, re.M)


@pytest.mark.usefixtures("planned_once")
def test_many_sites_are_grouped_by_stage_and_verbose_shows_each(call) -> None:
    _, grouped, _ = call("resnet101")
    assert re.search(r"^layer3\.0…22 ×23 +1024×14×14 +1024→64 +3,039,680 ", grouped, re.M)
    _, verbose, _ = call("resnet101", "--verbose")
    assert re.search(r"^layer3\.22 ", verbose, re.M)


@pytest.mark.usefixtures("planned_once")
def test_skipped_additions_are_counted_by_reason_and_verbose_lists_all(call) -> None:
    _, out, _ = call("hrnet_w18_small")
    assert re.search(r"^ +23 +fusion, not residual", out, re.M)
    _, verbose, _ = call("hrnet_w18_small", "-v")
    assert (
        len(re.findall(r"^stage\S+ +fusion, not residual|^\(model\) +fusion", verbose, re.M)) == 23
    )


def test_json_is_one_object_with_the_promised_keys(call) -> None:
    status, out, err = call("resnet50", "--json", "--exclude", "layer4.*", "--img-size", "192")
    data = json.loads(out)
    assert (status, err) == (0, "")
    assert list(data) == [
        "model",
        "r",
        "where",
        "variant",
        "input_size",
        "base",
        "augmented",
        "added",
        "sites",
        "skipped",
    ]
    assert data["model"] == "resnet50"
    assert data["r"] == 16
    assert data["where"] == "auto"
    assert data["variant"] == {
        "placement": "standard",
        "squeeze": "avg",
        "gate": "sigmoid",
        "bias": True,
        "init": "identity",
        "divisor": 8,
    }
    assert data["input_size"] == [3, 192, 192]
    assert data["base"]["params"] == 25_557_032
    assert data["augmented"]["macs"] == data["base"]["macs"] + data["added"]["macs"]
    assert data["added"] == {
        key: sum(site[key] for site in data["sites"]) for key in ("params", "macs")
    }
    assert data["sites"][0] == {
        "block": "layer1.0",
        "kind": "residual",
        "child": "se",
        "r": 16,
        "channels": 256,
        "bottleneck": 16,
        "shape": [256, 48, 48],
        "params": 8464,
        "macs": 2 * 256 * 16 + 2 * 256 * 48 * 48,
    }
    assert data["skipped"] == [
        {"block": f"layer4.{i}", "reason": "excluded by the user", "detail": ""} for i in range(3)
    ]


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["resnet18", "--divisor", "1"], r"^layer1\.0 +64×56×56 +64→4 "),
        (["resnet18", "--r", "8"], r"^layer4\.1 +512×7×7 +512→64 "),
        (["resnet18", "--r", "layer4.*=32, layer3.*=8", "--r", "16"], r"^layer4\.1 .* 512→16 "),
        (["resnet18", "--r", "layer4.*=32", "--r", "*=8"], r"^layer3\.1 .* 256→32 "),
        (["resnet50", "--placement", "pre"], r"^layer1\.0 +64×56×56 +64→8 "),
        (["resnet18", "--squeeze", "none"], r"^layer4\.1 .* 33,312 +1,605,632 +0 +25,088"),
        (
            ["resnet18", "--gate", "tanh", "--no-bias"],
            r"^The paper's variant with gate=tanh, bias=False\.$",
        ),
        (["resnet18", "--attention", "eca"], r"^eca in place of SE blocks"),
        (["test_resnet", "--shift"], r"^A variant with shift=True\.$"),
        (["test_resnet", "--attention", "cbam"], r"^cbam .*: each starts as the identity\.$"),
        (["test_resnet", "--attention", "eca", "--init", "paper"], r"^eca .* it may change what "),
        (["resnet18", "--attention", "halo", "--img-size", "256"], r"^8 sites"),
        (["resnet18", "--include", "layer4.*"], r"^2 sites"),
        (["resnet18", "--include", "layer3.*", "--include", "layer4.*"], r"^4 sites"),
        (["resnet18", "--img-size", "288"], r"^layer1\.0 +64×72×72"),
        (["resnet18", "--in-chans", "1"], r"^For one image of 1×224×224"),
        (["resnet18.a1_in1k"], r"^8 sites"),
        (["torchvision/resnet18"], r"^torchvision/resnet18: 11\.69 M"),
        (["fcn_resnet50"], r"^fcn_resnet50: "),  # a bare name that only torchvision knows
        (["torchvision.models:resnet18"], r"^8 sites"),
        (["regnet_x_400mf"], r"^22 sites"),  # its builder fails under torch.device("meta")
        (["test_resnet", "--r", "16"], r"kept at width 8, where C/r is less \(--divisor 1 gives"),
    ],
)
def test_options(call, args: list[str], line: str) -> None:
    status, out, _ = call(*args)
    assert status == 0
    assert re.search(line, out, re.M), out


def test_show_prints_the_forward_before_and_after(call) -> None:
    status, out, _ = call("resnet18", "--show", "layer1.0")
    before, after = out.split("SEBasicBlock.forward after")
    assert status == 0
    assert "bn2 += x" in before
    assert "se = self.se(bn2, x, in_place = True)" in after
    assert "bn2 += x" not in after


def test_a_module_in_the_current_directory_is_found(
    call,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import timm\n"
        "def build():\n"
        "    print('building')\n"
        "    return timm.create_model('resnet18', num_classes=3, in_chans=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    status, out, _ = call("my_nets:build", "--img-size", "96", "--in-chans", "1", "--json")
    assert status == 0
    data = json.loads(out)  # what the builder printed is not in it
    assert data["input_size"] == [1, 96, 96]
    assert data["base"]["params"] == 11_171_779


# --- errors: one or two lines on stderr, nothing on stdout, no traceback ------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet5O"], r"^error: no model 'resnet5O' .* Near names: .*resnet50"),
        (
            ["densenet121", "--where", "residual"],
            r"^error: no residual site: the forward of DenseNet adds no two maps",
        ),
        (
            ["vgg16", "--where", "residual"],
            r"^error: no residual site: the forward of VGG adds no two maps",
        ),
        (
            ["vit_base_patch16_224"],
            r"^error: no residual site in VisionTransformer: 24 x tokens, not a feature map",
        ),
        (["resnet18", "--r", "0"], r"^error: r=0 is not a positive whole number"),
        (["resnet18", "--r", "-4"], r"^error: r=-4 is not a positive whole number"),
        (["resnet18", "--r", "layer9.*=8,16"], r"^error: r='layer9\.\*' matches no block"),
        (["resnet18", "--r", "layer4.*=8"], r"^error: r=.* gives no number for block 'layer1\.0'"),
        (["resnet18", "--attention", "ecaa"], r"^error: no attention 'ecaa' in timm; use eca"),
        (
            ["resnet18", "--attention", "eca", "--gate", "tanh"],
            r"^error: gate='tanh' belongs to the SE block, which se_layer replaces",
        ),
        (
            ["torchvision/mobilenet_v2", "--placement", "3x3"],
            r"^error: no residual site .* 10 x 3x3: a child has the spatial convolution",
        ),
        (["resnet18", "--include", "nope"], r"^error: include='nope' matches no block"),
        (["resnet18", "--exclude", "nope"], r"^error: exclude='nope' matches no block"),
        (["resnet18", "--show", "layer9.0"], r"^error: block 'layer9\.0' gets no SE block"),
        (
            ["hrnet_w18_small", "--show", "stage2.0"],
            r"^error: block 'stage2\.0' gets no SE block: fusion, not residual",
        ),
        (
            ["inception_resnet_v2", "--img-size", "12"],
            r"^error: the forward of '.*' failed on an input of shape \[2, 3, 12, 12\]",
        ),
        (["hf-hub:no/such"], r"^error: building 'hf-hub:no/such' failed"),
    ],
)
def test_a_clear_error_and_exit_status_1(call, args: list[str], message: str) -> None:
    status, out, err = call(*args)
    assert (status, out) == (1, "")
    assert re.search(message, err, re.M)
    assert len(err.splitlines()) <= 2


@pytest.mark.parametrize(
    "args",
    [
        ["resnet18", "--r", "abc"],
        ["resnet18", "--r", "2.5"],
        ["resnet18", "--r", "layer4.*=x"],
        ["resnet18", "--r", "=8"],
        ["resnet18", "--r", "16,8"],
        ["resnet18", "--r", "16", "--r", "*=8"],
        ["resnet18", "--r", "layer4.*=8,layer4.*=16,16"],
        ["resnet18", "--placement", "somewhere"],
        ["resnet18", "--gate", "step"],
        ["--no"],
        ["resnet18", "--json", "--show", "layer1.0"],
    ],
)
def test_wrong_usage_has_exit_status_2(call, args: list[str]) -> None:
    status, out, err = call(*args)
    assert (status, out) == (2, "")
    assert "Usage" in err


# --- options from the fields of a dataclass -----------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Knobs:
    name: str = dataclasses.field(metadata={"argument": True, "help": "A name."})
    big_size: int = knob(3, "A number.", min=1)
    on: bool = knob(True, "A switch that is on.")
    off: bool = knob(False, "A switch that is off.")
    hidden: int = 5  # no help: no option


def invoke(command: Callable[..., None], *args: str) -> Result:
    own = typer.Typer()
    own.command()(expand(command))
    return CliRunner().invoke(own, args)


def test_a_command_takes_the_fields_of_a_dataclass() -> None:
    seen: list[Any] = []

    def whole(knobs: Knobs) -> None:
        seen.append(knobs)

    def one(knobs: Annotated[Knobs, Only("name", "big_size")], other: int = 0) -> None:
        seen.append((knobs.big_size, other))

    def some(given: Annotated[Given, Knobs]) -> None:
        seen.append(dict(given))

    assert invoke(whole, "x", "--big-size", "4", "--no-on", "--off").exit_code == 0
    assert invoke(one, "x", "--other", "2").exit_code == 0
    assert invoke(one, "x", "--off").exit_code == 2
    assert invoke(some, "--big-size", "3").exit_code == 0
    assert invoke(whole, "x", "--big-size", "0").exit_code == 2
    assert invoke(whole, "x", "--no-off").exit_code == 2
    assert invoke(whole, "x", "--hidden", "1").exit_code == 2
    assert seen == [Knobs(name="x", big_size=4, on=False, off=True), (3, 2), {"big_size": 3}]


def test_the_options_of_an_injection_become_one_object() -> None:
    seen: list[Any] = []

    def command(injection: Injection) -> None:
        seen.append(injection)

    assert invoke(command).exit_code == 0
    assert (
        invoke(command, "--r", "layer4.*=8,16", "--include", "a", "--include", "b").exit_code == 0
    )
    assert invoke(command, "--attention", "eca", "--gate", "tanh").exit_code == 0
    assert seen == [
        Injection(),
        Injection(r={"layer4.*": 8, "*": 16}, include=("a", "b")),
        Injection(attention="eca", gate="tanh"),
    ]


# --- help, version, real processes -------------------------------------------------------------


def test_help_names_every_option_with_its_default() -> None:
    result: Result = CliRunner().invoke(cli.app, ["report", "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    options = "--r --divisor --include --img-size --show --json --verbose --placement --squeeze"
    for option in f"{options} --gate --no-bias --init --attention".split():
        assert option in result.output
    assert "default: 16" in result.output
    assert "se-inject resnet50 --r 16" in result.output


def test_no_argument_prints_the_help() -> None:
    result = CliRunner().invoke(cli.app, [])
    assert "Squeeze-and-Excitation for a network you already have" in result.output


def test_the_version() -> None:
    result = command("--version")
    assert result.stdout == f"se-inject {se_inject.__version__}\n"


def test_a_real_process_prints_the_report_into_a_pipe() -> None:
    result = run("resnet50", "--r", "16")
    assert (result.returncode, result.stderr) == (0, "")
    assert "25.56 M → 28.09 M parameters" in result.stdout
    assert "\x1b[" not in result.stdout


def test_a_failure_has_no_traceback() -> None:
    result = command("densenet121", "--where", "residual")
    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1


def test_warnings_go_to_stderr() -> None:
    result = command("resnet18", "--r", "1000000", "--json")
    assert result.returncode == 0
    json.loads(result.stdout)
    assert result.stderr.startswith("warning: r=1000000 is more than the channels of any block")


def test_a_terminal_without_unicode_still_gets_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["se-inject", "resnet18"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    terminal.flush()
    assert b"64?56?56" in terminal.buffer.getvalue()


def test_a_full_disk_is_one_line() -> None:
    program = "import sys; from se_inject.cli.app import main; sys.argv[1:] = ['resnet18']; main()"
    result = ended(program, stdout="/dev/full")
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot write: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "kind"), [("report", Injection), ("finetune", Settings)], ids=["report", "finetune"]
)
def test_every_field_is_an_option_with_its_help(command: str, kind: type, call) -> None:
    """A new option is a new field: the commands are made from the fields."""
    group = typer.main.get_command(cli.app)
    parameters = {p.name: p for p in group.commands[command].params}
    for field in dataclasses.fields(kind):
        parameter = parameters[field.name]
        if not field.metadata.get("argument"):
            assert "--" + field.name.replace("_", "-") in parameter.opts
        assert parameter.help == field.metadata["help"]
        assert field.metadata["help"].endswith((".", ")"))
