"""gates, prune and page on a small run; the page in a browser."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from se_inject import inject_se, load_se, save_se
from se_inject.finetune.after import evaluate as use
from se_inject.finetune.after import page as paging
from se_inject.finetune.after.page import command_of, write_page
from se_inject.finetune.options.settings import Settings
from se_inject.finetune.runs import trainer as running
from se_inject.models.names import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
CLASSES = ("blue <b>", "green & co", "red")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on 36 images, with a control arm, and its page."""
    root = tmp_path_factory.mktemp("page")
    for k, name in enumerate(CLASSES):
        (root / "data" / name).mkdir(parents=True)
        for i in range(12):
            color = [60 + 5 * i] * 3
            color[k] = 255 - i
            Image.new("RGB", (16, 16), tuple(color)).save(root / "data" / name / f"{i}.png")
    settings = Settings(
        "test_resnet",
        data=str(root / "data"),
        pretrained=False,
        epochs=1,
        img_size=32,
        workers=0,
        batch_size=9,
        control=True,
    )
    run = root / "run"
    running.start(settings, run, Console(quiet=True))
    write_page(run)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may write to."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- gates and prune -----------------------------------------------------------------------------


def test_gates_of_a_run(call, finished: Path, tmp_path: Path) -> None:
    status, out, _ = call("gates", str(finished), "--output", str(tmp_path / "pictures"))
    assert status == 0
    assert all(f"layer{i}.0" in out for i in (1, 2, 3, 4))
    assert "of 4 SE blocks" in " ".join(out.split())
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    stems = ("gates-heat-map", "gates-classes", "gates-spread")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}


def test_gates_of_a_file_are_those_of_the_run(call, finished: Path) -> None:
    status, out, _ = call("gates", str(finished), "--json")
    of_run = json.loads(out)
    assert status == 0
    assert of_run["images"] == 6  # a fifth of 12, of each class
    best, data = str(finished / "best.safetensors"), str(finished.parent / "data")
    status, out, err = call(
        "gates", "test_resnet", "--weights", best, "--data", data, "--img-size", "32", "--json"
    )
    assert (status, err) == (0, "")
    of_file = json.loads(out)
    assert of_file["images"] == 36
    assert of_file["classes"] == of_run["classes"] == list(CLASSES)
    means = [[block["mean"] for block in found["blocks"]] for found in (of_run, of_file)]
    assert means[0] == pytest.approx(means[1], abs=0.05)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (["resnet18"], 1, "resnet18 is not a run folder. For a model, name the file"),
        (["resnet18", "--weights", "x"], 2, "needs --data"),
        (["RUN", "--img-size", "32"], 2, "belong to MODEL with --weights"),
        (
            ["RUN", "--output", "DIR", "--classes", "rad"],
            1,
            "there is no class 'rad'. Near names: 'red'",
        ),
        (["RUN", "--data", "OTHER"], 1, "are not those of the run"),
    ],
)
def test_gates_that_cannot_be(
    call, args: list[str], status: int, message: str, finished: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "other" / name / "0.png")
    names = {"RUN": finished, "DIR": tmp_path / "out", "OTHER": tmp_path / "other"}
    found, out, err = call("gates", *(str(names.get(arg, arg)) for arg in args))
    assert (found, out) == (status, "")
    assert message in " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())


def test_prune_writes_a_smaller_network_that_loads(call, run: Path) -> None:
    status, out, _ = call("prune", str(run), "--max-change", "1", "--exclude", "layer4.*")
    assert status == 0
    assert "Folded 3 of 4 blocks with SE" in out
    assert "layer4.0 stays: excluded by the user" in out
    assert "4 SE blocks → 1" in out
    weights = load_file(run / "pruned.safetensors")
    assert [key for key in weights if key.endswith("se.fc1.weight")] == ["layer4.0.se.fc1.weight"]
    trained = use.load_run(run)
    network = load_model("test_resnet", num_classes=3)
    load_se(network, run / "pruned.safetensors").eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(network(x), trained.network(x), rtol=0.05, atol=0.05)


def test_nothing_goes_where_no_change_is_allowed(call, run: Path) -> None:
    network = load_model("test_resnet", num_classes=3)
    inject_se(network, example_input=torch.empty(1, 3, 32, 32))
    with torch.no_grad():
        network.load_state_dict(load_file(run / "best.safetensors"), strict=False)
        for name, p in network.named_parameters():
            if ".se.fc2" in name:
                p.normal_(0, 0.5)
    save_se(network, run / "best.safetensors", extra="*")
    status, out, _ = call("prune", str(run), "--max-change", "0", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["folded"] == []
    assert len(found["kept"]) == 4
    assert found["savings"]["blocks"] == [4, 4]
    assert call("prune", str(run))[0] == 2  # without --max-change


# --- the page ----------------------------------------------------------------------------------


class _Parsed(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        names = ("src", "href", "xlink:href", "srcset", "data")
        self.addresses += [values[name] for name in names if values.get(name)]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_with_all_of_the_run(finished: Path) -> None:
    text = (finished / "page.html").read_text(encoding="utf-8")
    page = _Parsed(text)
    ids = ("verdict", "arms", "curves", "counts", "samples", "by-class", "confusion", "advice")
    assert {*ids, "gates", "cost", "command"} <= set(page.ids)
    assert page.tags.count("svg") == 4
    assert page.tags.count("img") == 3
    assert "script" not in page.tags
    assert "link" not in page.tags
    # Nothing is fetched: pictures are in the page, and SVG refers to parts of itself.
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    words = " ".join(" ".join(page.words).split())
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["verdict"] in words
    assert all(name in words for name in CLASSES)  # and "<b>" is no markup
    assert f"{summary['arms']['se']['params']:,}" in words
    assert "se-inject finetune test_resnet --data" in words
    with (finished / "confusion.csv").open() as file:
        _, first, *_ = csv.reader(file)
    assert " ".join(first) in words
    assert text.count("prefers-color-scheme: dark") == 1
    assert "@media print" in text


BROWSER_TEST = pytest.mark.skipif(
    BROWSER is None, reason="needs a headless Chromium (Debian's package chromium)"
)


def in_browser(page: Path, folder: Path, *args: str) -> str:
    """What Chromium prints of a page, in a profile of its own."""
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", *args]
    done = subprocess.run(
        [*command, page.as_uri()], capture_output=True, text=True, timeout=1200, check=True
    )
    return done.stdout


@BROWSER_TEST
def test_a_browser_shows_the_page_without_overflow(finished: Path, tmp_path: Path) -> None:
    """Headless windows have a least width, so a frame of 375 px stands for the phone."""
    frame = tmp_path / "frame.html"
    address = (finished / "page.html").as_uri()
    frame.write_text(
        f"""<iframe id=f style="border:0" width=375 height=2000 src="{address}">
        </iframe><pre id=out></pre><script>onload = () => {{
          const d = document.getElementById("f").contentDocument, e = d.documentElement;
          const seen = [...d.querySelectorAll("svg, table, img")].filter(
            x => x.getBoundingClientRect().width > 40 && x.getBoundingClientRect().height > 20);
          document.getElementById("out").textContent = JSON.stringify({{
            inner: e.clientWidth, wide: Math.max(e.scrollWidth, d.body.scrollWidth),
            svg: seen.filter(x => x.tagName == "svg").length, all: seen.length,
            text: d.querySelectorAll("svg text").length}});
        }}</script>"""
    )
    out = in_browser(frame, tmp_path, "--allow-file-access-from-files", "--dump-dom")
    found = json.loads(re.search(r'<pre id="out">(\{.*?\})</pre>', out).group(1))
    assert found["inner"] == 375
    assert found["wide"] <= 375
    assert found["svg"] == 4
    assert found["all"] >= 4 + 6 + 3
    assert found["text"] > 40


@BROWSER_TEST
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_is_light_or_dark_as_the_reader_likes(
    dark: bool, finished: Path, tmp_path: Path
) -> None:
    shot = tmp_path / "page.png"
    args = [f"--screenshot={shot}", "--window-size=600,600"]
    if dark:
        args.append("--blink-settings=preferredColorScheme=0")
    else:
        args.append("--blink-settings=preferredColorScheme=1")
    in_browser(finished / "page.html", tmp_path, *args)
    with Image.open(shot) as image:
        corner = image.convert("L").getpixel((3, 590))
    assert corner < 60 if dark else corner > 200


def test_page_as_a_command_measures_the_latency(
    call, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("se_inject.report.latency._MIN_SECONDS", 0.0)
    (run / "page.html").unlink()
    status, out, _ = call("page", str(run), "--benchmark")
    assert (status, out.strip()) == (0, f"The page of the run: {run / 'page.html'}")
    assert "milliseconds, batch of 1" in (run / "page.html").read_text(encoding="utf-8")
    status, _, err = call("page", str(run.parent))
    assert status == 1
    assert "is not a run folder" in err


@pytest.mark.parametrize("fails", [False, True], ids=["drawn", "fails"])
def test_finetune_draws_the_page_and_a_fault_there_loses_nothing(
    call, fails: bool, finished: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "page.html").unlink()
    if fails:

        def broken(*_: Any) -> str:
            raise RuntimeError("no picture today")

        monkeypatch.setattr(paging.page_figures, "inline_svg", broken)
    # A run whose arms are done is summed up anew, and trains nothing.
    status, out, err = call("finetune", "--resume", str(run))
    assert status == 0
    assert "Best weights, metrics and curves" in out
    assert (run / "page.html").exists() == (not fails)
    assert ("no picture today" in err) == fails
    assert (run / "summary.json").exists()


def test_many_classes_have_pairs_in_place_of_a_matrix(tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(30)]
    matrix = torch.eye(30, dtype=torch.long) * 5
    matrix[3, 7] = 4
    with (tmp_path / "confusion.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    assert paging._matrix(tmp_path, names) == []
    assert paging._pairs(tmp_path, names) == [("c3", "c7", 4)]


def test_the_command_of_a_run_gives_its_settings_again() -> None:
    settings = Settings(
        "resnet50",
        data="my data",
        epochs=3,
        pretrained=False,
        control=True,
        include=("layer4.*",),
        r={"layer4.*": 8, "*": 16},
    )
    assert command_of(settings) == (
        "se-inject finetune resnet50 --data 'my data' --no-pretrained --epochs 3 --control"
        " --r 'layer4.*=8,*=16' --include 'layer4.*'"
    )
