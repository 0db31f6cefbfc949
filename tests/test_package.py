"""What travels in the package, and what it says of itself."""

import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the source distribution, by their path in the repository."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {
            member.name.split("/", 1)[1]: archive.extractfile(member).read() for member in members
        }


def test_the_source_distribution_has_files_of_the_repository_alone(sdist: dict[str, bytes]) -> None:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a clone of the repository")  # but an unpacked source distribution
    new = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    known = set(done.stdout.splitlines()) | set(new.stdout.splitlines())
    assert sdist.keys() - known == {"PKG-INFO"}
    assert not any(".hypothesis" in name or "__pycache__" in name for name in sdist)
    missing = {name for name in known if name.startswith(("se_inject/", "tests/"))} - sdist.keys()
    assert missing == set()


def test_the_package_says_what_it_is(sdist: dict[str, bytes]) -> None:
    said = Parser().parsestr(sdist["PKG-INFO"].decode())
    assert said["Author"] == "The se-inject maintainers"
    assert said.get_all("Project-URL")
    classifiers = " ".join(said.get_all("Classifier"))
    assert "Operating System ::" in classifiers
    assert "Programming Language :: Python :: 3.11" in classifiers
    extras = set(said.get_all("Provides-Extra"))
    assert {"finetune", "onnx", "hub", "viz", "docs", "all"} <= extras
