"""Any file gives the right network or one CheckpointError, and special files stay what they are."""

import copy
import json
import math
import os
import random
import signal
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from processes import ended
from safetensors.torch import load_file, save_file
from small_net import build
from test_whole import same_tensors, state
from torch import nn

from se_inject import ArgumentError, CheckpointError, inject_se, load_se, save_se, se_parameters
from se_inject.keep.atomic import atomic_write
from se_inject.models.files import load_weights

X = torch.randn(2, 3, 8, 8)


def injected() -> nn.Module:
    model = inject_se(build().eval(), 4, example_input=X)
    with torch.no_grad():
        for p in se_parameters(model):
            p.normal_()
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "se.safetensors"
    torch.manual_seed(0)
    save_se(injected(), path, extra="head.*")
    return path


def header_text(path: Path) -> str:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return str(json.loads(raw[8 : 8 + size])["__metadata__"]["se_inject"])


def with_header(path: Path, text: str, to: Path) -> None:
    save_file(load_file(path), to, metadata={"se_inject": text})


# --- every mutation ------------------------------------------------------------------------------

DEEP: Any = None
for _ in range(200):
    DEEP = {"list": [DEEP]}

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**40, 2**63, 2**64, 10**400, 1e308, math.nan, math.inf),
    *("", "\0", "\x1b[31m\n\r\u202e", "a" * 5000, "*", "[", ".", "se", "se.fc1", "float32", "int8"),
    *([], [[]], {}, {"tensor": [2**62], "dtype": "float32"}, {"tensor": [1] * 80, "dtype": "bool"}),
    *({"tensor": [2, 3, 8, 8], "dtype": "nn"}, {"value": {}}, {"dict": [[[], 1]]}, DEEP),
]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if type(value) is list
        else ()
    )
    return [path, *(p for key, part in inner for p in paths_in(part, (*path, key)))]


def mutated_header(text: str, draw: random.Random) -> str:
    data = json.loads(text)
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        path = draw.choice([p for p in paths_in(data) if p])
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        kind = draw.randrange(5)
        if kind == 0:
            del owner[path[-1]]
        elif kind == 1 and isinstance(owner, list):
            owner.append(copy.deepcopy(draw.choice(owner)))
        elif kind == 2 and isinstance(owner, dict):
            owner[str(draw.choice(ODD))[:40]] = owner.pop(path[-1])
        else:
            owner[path[-1]] = copy.deepcopy(draw.choice(ODD))
    return json.dumps(data)


def mutate(path: Path, to: Path, draw: random.Random) -> None:
    kind = draw.randrange(5)
    text = header_text(path)
    if kind < 3:
        with_header(path, mutated_header(text, draw), to)
    elif kind == 3:
        at = draw.randrange(len(text))
        piece = draw.choice(["", "NaN", "}", "]", '"', "9" * 5000, "[" * 5000, "\\u0000", ',"a":1'])
        with_header(path, text[:at] + piece + text[at + draw.randrange(3) :], to)
    else:
        raw = bytearray(path.read_bytes())
        for _ in range(draw.choice([1, 3, 50])):
            raw[draw.randrange(min(len(raw), draw.choice([8, 2000, len(raw)])))] = draw.randrange(
                256
            )
        to.write_bytes(raw[: draw.choice([len(raw), len(raw), draw.randrange(len(raw))])])


def check_file(path: Path) -> str:
    """Load a file; say how it went. The base stays whole."""
    base = build().eval()
    with torch.no_grad():
        base.head.weight.add_(1)  # which the file replaces
    before, twin = state(base), copy.deepcopy(base)
    try:
        load_se(base, path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) <= 2  # noqa: PT017
        assert all(c.isprintable() or c == "\n" for c in str(error)), str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
        assert state(base) == before
        assert same_tensors(base, twin)
        return "refused"
    base(X)
    return "loaded"


@pytest.mark.filterwarnings("ignore:.*the weights fit, but:UserWarning")
def fuzz(good: Path, folder: Path, first: int, count: int) -> None:
    seen = set()
    for seed in range(first, first + count):
        mutate(good, folder / "bad.safetensors", random.Random(seed))
        try:
            seen.add(check_file(folder / "bad.safetensors"))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    assert "refused" in seen


@pytest.mark.filterwarnings("ignore:.*the weights fit, but:UserWarning")
def test_500_mutated_files(good: Path, tmp_path: Path) -> None:
    fuzz(good, tmp_path, 0, 500)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*the weights fit, but:UserWarning")
def test_5000_mutated_files(good: Path, tmp_path: Path) -> None:
    fuzz(good, tmp_path, 500, 5000)


def set_site(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header["sites"][0].update(changes)


def set_settings(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: [site["settings"].update(changes) for site in header["sites"]]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "example out of range": (set_settings(example=5), "its header is damaged .*the example 5 of 1"),
    "negative example": (set_settings(example=-1), "its header is damaged"),
    "huge divisor": (set_settings(divisor=2**40), "its header is damaged"),
    "huge bottleneck": (set_site(bottleneck=2**40), "its header is damaged"),
    "large bottleneck": (set_site(bottleneck=2**27), r"widths \(8, 134217728\), and here it is"),
    "site twice": (lambda h: h["sites"].append(h["sites"][0]), "a site comes twice"),
    "control characters": (set_site(block="\x1b[2J\n\0"), r"does not fit this base: .*\\x1b"),
    "not a number": (set_settings(divisor=math.nan), "NaN is no JSON"),
    "deep": (lambda h: h.update(examples=[DEEP]), "nested too deeply"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header(kind: str, good: Path, tmp_path: Path) -> None:
    change, message = HEADERS[kind]
    data = json.loads(header_text(good))
    change(data)
    with_header(good, json.dumps(data), tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_se(build().eval(), tmp_path / "bad.safetensors")
    assert check_file(tmp_path / "bad.safetensors") == "refused"


def test_a_key_that_comes_twice(good: Path, tmp_path: Path) -> None:
    text = '{"format": 2, ' + header_text(good)[1:]
    with_header(good, text, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match="a key comes twice"):
        load_se(build().eval(), tmp_path / "bad.safetensors")


def test_a_width_without_its_tensors_is_never_built(good: Path, tmp_path: Path) -> None:
    """The header and the plan agree on a bottleneck of gigabytes, and the file has no tensor."""
    data = json.loads(header_text(good))
    for site in data["sites"]:
        site["settings"]["divisor"] = 2**30
        site["bottleneck"] = 2**30
    tensors = {k: v for k, v in load_file(good).items() if ".se." not in k}
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"se_inject": json.dumps(data)})
    with pytest.raises(CheckpointError, match=r"the file lacks 'blocks.0.se.fc1.weight'"):
        load_se(build().eval(), tmp_path / "bad.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_reading_never_waits_on_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "se.safetensors")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_se(build(), tmp_path / "se.safetensors")
    with pytest.raises(CheckpointError, match="is no regular file"):
        load_se(build(), "/dev/null")


# --- writing -------------------------------------------------------------------------------------


def write(path: Path, text: str = "new") -> None:
    with atomic_write(path) as part:
        part.write_text(text)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_special_files_are_refused_and_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    device = Path("/dev/null").stat().st_rdev
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/null")):
        with pytest.raises(ArgumentError, match="is no regular file"):
            write(path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert Path("/dev/null").stat().st_rdev == device


def test_links_stay_and_their_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("old")
    (tmp_path / "first").symlink_to(Path("folder") / "file")
    (tmp_path / "second").symlink_to("first")
    (tmp_path / "dangling").symlink_to("later")
    (tmp_path / "circle").symlink_to("circle")
    write(tmp_path / "second")
    write(tmp_path / "dangling")
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert (tmp_path / "later").read_text() == "new"
    with pytest.raises(ArgumentError, match="circle"):
        write(tmp_path / "circle")


def test_mode_and_owner_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    for mode in (0o600, 0o640, 0o444, 0o200):
        path.chmod(mode)
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    if os.geteuid() == 0:
        os.chown(path, 12345, 23456)
        write(path)
        assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)
    mask = os.umask(0o027)
    try:
        write(tmp_path / "other")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o640


def test_a_name_of_255_bytes_and_one_of_256(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 243 + ".safetensors"))
    assert len(list(tmp_path.iterdir())) == 1
    for name in ("n" * 244 + ".safetensors", "with\0nul"):
        with pytest.raises(ArgumentError, match="cannot be a file here"):
            write(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 1


def test_no_glob_finds_what_is_being_written(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a.safetensors") as part:
        part.write_text("half")
        assert list(tmp_path.rglob("*.safetensors")) == []
    assert [p.name for p in tmp_path.glob("*")] == ["a.safetensors"]


def test_what_a_killed_process_left_is_swept_and_of_others_is_not(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from se_inject.keep.atomic import atomic_write
with atomic_write(Path({str(tmp_path / "a.safetensors")!r})) as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert ended(program).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    elsewhere = tmp_path / ".se-inject-otherhost-1-x.part"
    elsewhere.write_text("of a process of another machine")
    with atomic_write(tmp_path / "b") as part:
        assert not left.exists()
        part.write_text("b")
        done = threading.Thread(target=write, args=(tmp_path / "c",))
        done.start()
        done.join()
        assert part.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [elsewhere.name, "b", "c"]


def test_another_name_of_a_file_keeps_the_old_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    os.link(tmp_path / "file", tmp_path / "other")
    write(tmp_path / "file")
    assert ((tmp_path / "file").read_text(), (tmp_path / "other").read_text()) == ("new", "old")


def test_what_is_being_written_lies_beside_its_target(tmp_path: Path) -> None:
    """A rename is atomic within one file system only."""
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "elsewhere" / "file.txt")
    (tmp_path / "elsewhere" / "file.txt").write_text("old")
    for path, folder in ((tmp_path / "new.txt", tmp_path), (link, tmp_path / "elsewhere")):
        with atomic_write(path) as part:
            part.write_text("new")
            assert part.parent == folder
        assert path.read_text() == "new"


class RunsCode:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').close()", {})


def test_weights_of_a_network_run_no_code(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet")
    file, written = tmp_path / "weights.pth", tmp_path / "written"
    torch.save({"state_dict": model.state_dict(), "args": RunsCode(written)}, file)
    with pytest.raises(CheckpointError, match="without running code"):
        load_weights(model, file)
    assert not written.exists()
    torch.load(file, weights_only=False)
    assert written.exists()  # It would have.
