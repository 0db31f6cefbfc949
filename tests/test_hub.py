"""Folders to share: what ``save_se("folder/")`` writes, and loading it from a disk and from a Hub.

The Hub is ``hub_server``: the client of Hugging Face asks it over HTTP, in a process of its own,
because it reads its environment variables once.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers import open_gates, randomize
from hub_server import TOKEN, Hub, serving
from small_net import build
from torch import nn

import se_inject
from se_inject import (
    ArgumentError,
    CheckpointError,
    NoSiteError,
    from_pretrained,
    inject_se,
    load_se,
    save_se,
)
from se_inject.finetune.figures.results import summarize
from se_inject.finetune.options.config import write_config
from se_inject.finetune.options.settings import Settings

X = torch.randn(2, 4, 64, 64, generator=torch.Generator().manual_seed(0))
FILES = {"README.md", "config.json", "se.safetensors"}


def network() -> nn.Module:
    base = randomize(timm.create_model("test_resnet", num_classes=5, in_chans=4)).eval()
    model = inject_se(base, {"layer4.*": 8, "*": 16}, gate="tanh", example_input=X)
    open_gates(model)
    return model


def small() -> nn.Module:
    model = inject_se(build().eval(), 4)
    open_gates(model)
    return model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What a finished run of one epoch says; nothing was trained."""
    folder = tmp_path / "somewhere" / "run"
    folder.mkdir(parents=True)
    write_config(
        Settings(model="test_resnet", data=str(tmp_path / "somewhere" / "flowers")), folder
    )
    result = {
        "arm": "se",
        "seed": 0,
        "val_acc": 0.75,
        "last_val_acc": 0.71875,
        "best_epoch": 1,
        "history": [{"epoch": 1}],
    }
    result |= {"params": 10, "macs": 10, "seconds": 1.0, "unreadable": []}
    result |= {"classes": ["daisy", "rose"], "input_size": [3, 64, 64]}
    (folder / "summary.json").write_text(json.dumps(summarize([result])))
    return folder


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """What the search of the Hub reads, and what people read."""
    _, data, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(data), text


# --- a folder on the disk ------------------------------------------------------------------------


def test_a_folder_brings_the_whole_network_back(tmp_path: Path) -> None:
    model = network()
    save_se(model, f"{tmp_path}/net/", extra="*")
    assert {file.name for file in (tmp_path / "net").iterdir()} == FILES
    for source in (tmp_path / "net", f"{tmp_path}/net/"):
        again = from_pretrained(source)
        assert not again.training
        assert torch.equal(again(X), model(X))
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["base"] == "test_resnet.r160_in1k"
    assert (config["in_chans"], config["num_classes"]) == (4, 5)
    se_inject.remove_se(again)
    assert torch.equal(load_se(again, tmp_path / "net")(X), model(X))


def test_the_card_says_the_base_the_blocks_and_how_to_load_them(tmp_path: Path) -> None:
    save_se(network(), f"{tmp_path}/net/")
    data, text = card_of(tmp_path / "net")
    assert data["base_model"] == "timm/test_resnet.r160_in1k"
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "se-inject"
    assert "squeeze-and-excitation" in data["tags"]
    assert "model-index" not in data
    assert "| base | `test_resnet.r160_in1k` |" in text
    assert "| blocks | 4, r = 8 and 16, gate=tanh |" in text
    assert "from_pretrained(" in text
    assert str(tmp_path) not in text


def test_the_licence_can_be_given_and_a_card_that_was_edited_stays(tmp_path: Path) -> None:
    for name in ("mit", "apache-2.0"):
        save_se(small(), f"{tmp_path}/net/", license=name)
        assert card_of(tmp_path / "net")[0]["license"] == name
    for _ in range(2):
        (tmp_path / "net" / "README.md").write_text("mine")
        save_se(small(), f"{tmp_path}/net/", license="mit")
        assert (tmp_path / "net" / "README.md").read_text() == "mine"


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "README.md").write_text("mine")
    save_se(small(), f"{tmp_path}/net/")
    assert (tmp_path / "net" / "README.md").read_text() == "mine"


def test_a_run_gives_the_card_its_data_and_accuracies(run: Path, tmp_path: Path) -> None:
    save_se(network(), f"{tmp_path}/net/", run=run)
    data, text = card_of(tmp_path / "net")
    (entry,) = data["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.71875}]
    assert "| validation images, last epoch | 71.88 % |" in text
    assert "No control arm" in text
    assert "| data | `flowers` |" in text
    assert "| images | 3 × 64 × 64 |" in text
    assert str(tmp_path) not in text
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["class_names"] == ["daisy", "rose"]


def test_test_images_stand_before_those_of_the_last_epoch(run: Path, tmp_path: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["arms"]["se"]["test"] = {"mean": 0.625, "sd": None}
    (run / "summary.json").write_text(json.dumps(summary))
    save_se(network(), f"{tmp_path}/net/", run=run)
    results = card_of(tmp_path / "net")[0]["model-index"][0]["results"]
    assert [entry["dataset"]["split"] for entry in results] == ["test", "validation"]
    assert results[0]["metrics"][0]["value"] == 0.625


def test_a_base_that_only_the_user_can_build_is_said_so(tmp_path: Path) -> None:
    model = small()
    save_se(model, f"{tmp_path}/net/")
    assert "load_se(base, " in card_of(tmp_path / "net")[1]
    with pytest.raises(CheckpointError, match="does not say its base"):
        from_pretrained(tmp_path / "net")
    x = X[:, :3]
    assert torch.equal(load_se(build().eval(), tmp_path / "net")(x), model(x))


def test_the_name_of_a_base_can_be_given(tmp_path: Path) -> None:
    from torchvision.models import mnasnet0_5

    model = inject_se(mnasnet0_5().eval())
    save_se(model, f"{tmp_path}/net/", base="torchvision/mnasnet0_5", extra="*")
    assert torch.equal(from_pretrained(tmp_path / "net")(X[:, :3]), model(X[:, :3]))


# --- what is refused -----------------------------------------------------------------------------


def test_options_of_a_folder_are_not_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"license, push_to_hub is of a folder.*a slash"):
        save_se(small(), tmp_path / "se.safetensors", license="mit", push_to_hub="me/net")
    assert not any(tmp_path.iterdir())


def test_a_folder_of_somebody_else_stays_as_it_is(run: Path) -> None:
    before = {file.name for file in run.iterdir()}
    with pytest.raises(ArgumentError, match=r"config\.json is not of save_se \(a run"):
        save_se(small(), f"{run}/")
    assert {file.name for file in run.iterdir()} == before


def test_a_folder_that_could_not_be_filled_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="matches no tensor"):
        save_se(small(), f"{tmp_path}/net/", extra="nothing")
    with pytest.raises(NoSiteError):
        save_se(build(), f"{tmp_path}/net/")
    with pytest.raises(CheckpointError, match="no finished run"):
        save_se(small(), f"{tmp_path}/net/", run=tmp_path)
    with pytest.raises(ArgumentError, match="there is no folder"):
        save_se(small(), f"{tmp_path}/no/net/")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", "{}", '{"arms": {"se": {}}}', "{", "null"])
def test_a_damaged_run_is_refused(text: str, run: Path, tmp_path: Path) -> None:
    (run / "summary.json").write_text(text)
    with pytest.raises(CheckpointError, match="is a damaged run"):
        save_se(small(), f"{tmp_path}/net/", run=run)
    assert not (tmp_path / "net").exists()


HOSTILE: dict[str, tuple[Any, str]] = {
    "code": ({"base": "os:getcwd"}, "says 'os:getcwd' of its base, which only you can build"),
    "repository": ({"base": "hf-hub:evil/net"}, "only you can build"),
    "folder": ({"base": "local-dir:/evil"}, "only you can build"),
    "another library": ({"library_name": "timm"}, "is damaged, or not of save_se"),
    "no name": ({"base": ["resnet50"]}, "its base is no name"),
    "control characters": ({"base": "\x1b[2J"}, "its base is no name"),
    "long": ({"base": "r" * 10_000}, "its base is no name"),
    "channels": ({"in_chans": 2**40}, "in_chans is 1099511627776"),
    "truth": ({"in_chans": True}, "in_chans is True"),
    "no object": (None, "is damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_is_refused(kind: str, tmp_path: Path) -> None:
    changes, message = HOSTILE[kind]
    save_se(small(), f"{tmp_path}/net/")
    path = tmp_path / "net" / "config.json"
    said = None if changes is None else json.loads(path.read_text()) | changes
    path.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(tmp_path / "net")
    assert len(str(caught.value).splitlines()) == 1


def test_a_hostile_file_in_a_folder_is_refused_as_a_file_is(tmp_path: Path) -> None:
    save_se(network(), f"{tmp_path}/net/", extra="*")
    path = tmp_path / "net" / "se.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"not a whole \.safetensors file"):
        from_pretrained(tmp_path / "net")
    path.unlink()
    with pytest.raises(CheckpointError, match="there is no such file"):
        from_pretrained(tmp_path / "net")
    with pytest.raises(CheckpointError, match="there is no such file"):
        load_se(build(), tmp_path / "net")


def test_of_a_file_alone_the_base_is_not_known(tmp_path: Path) -> None:
    save_se(network(), tmp_path / "se.safetensors")
    with pytest.raises(CheckpointError, match="is not a folder of save_se"):
        from_pretrained(tmp_path / "se.safetensors")


# --- a Hub ---------------------------------------------------------------------------------------

SCRIPT = """
import torch
from pathlib import Path
from test_hub import X, network
from se_inject import ExportError, CheckpointError, from_pretrained, load_se, remove_se, save_se

folder = Path({folder!r})
model = network()
torch.manual_seed(0)
save_se(model, f"{{folder}}/", extra="*", push_to_hub="me/net")
again = from_pretrained("hf-hub:me/net")
assert torch.equal(again(X), model(X))
assert torch.equal(load_se(remove_se(again), "hf-hub:me/net@main")(X), model(X))

(folder / "README.md").write_text("another")
(folder / "secret.txt").write_text("secret")
save_se(model, f"{{folder}}/", extra="*", push_to_hub="me/net")

for source, kind in (
    ("hf-hub:me/nothing", "RepositoryNotFoundError"),
    ("hf-hub:me/net@v2", "RevisionNotFoundError"),
    ("hf-hub:me/empty", "EntryNotFoundError"),
    ("hf-hub:me/bad", "not a whole .safetensors file"),
    ("hf-hub:../../net", "HFValidationError"),
):
    try:
        from_pretrained(source)
    except CheckpointError as error:
        assert kind in str(error), error
        assert len(str(error).splitlines()) == 1, error
    else:
        raise AssertionError(source)

import os
os.environ["HF_TOKEN"] = "hf_wrong"
try:
    save_se(model, f"{{folder}}/", push_to_hub="me/other")
except ExportError as error:
    assert "is written, and cannot be put on the Hub as 'me/other'" in str(error), error
else:
    raise AssertionError("a wrong token")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    with serving() as hub:
        hub.put("me/empty", {})
        yield hub


def test_a_repository_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    save_se(network(), f"{bad}/", extra="*")
    files = {name: (bad / name).read_bytes() for name in FILES}
    hub.put("me/bad", files | {"se.safetensors": files["se.safetensors"][:-100]})
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path / "net"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stderr
    stored = hub.repos["me/net"]["main"]
    assert set(stored) == FILES
    # The card on the Hub stays, for its people edit it there.
    assert b"hf-hub:me/net" in stored["README.md"]
    assert "me/other" not in hub.repos
    assert "GET /me/net/resolve/main/se.safetensors" in " ".join(hub.asked)
