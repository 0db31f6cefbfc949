"""Talks to the Hugging Face Hub. A repository is ``hf-hub:user/repo[@revision]``, as in timm.

The client is huggingface_hub, which comes with timm. Its environment variables work as they do
elsewhere: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from se_inject.errors import CheckpointError, ExportError, SEInjectError, first_line

_PREFIXES = ("hf-hub:", "hf_hub:")

T = TypeVar("T")


def is_on_hub(source: str) -> bool:
    """Whether a source names a repository of the Hub rather than a file or a folder."""
    return source.startswith(_PREFIXES)


def download(source: str, name: str) -> Path:
    """The file ``name`` of a repository, from the Hub or from its local cache.

    Raises:
        CheckpointError: there is no such repository, revision or file, or the Hub cannot be asked.
    """
    repo, _, revision = source.partition(":")[2].partition("@")
    from huggingface_hub import hf_hub_download

    return _ask(
        lambda: Path(hf_hub_download(repo, name, revision=revision or None)),
        CheckpointError,
        f"{source}: {name} cannot be had",
    )


def upload(folder: Path, repo: str, names: tuple[str, ...], card: str) -> str:
    """Upload these files of a folder to a repository, which is created if it does not exist.

    Args:
        card: the name of the model card. A repository that has one keeps it, because people edit
            their cards.

    Returns:
        the address of the repository.

    Raises:
        ExportError: the Hub refuses the files or cannot be asked.
    """
    from huggingface_hub import HfApi

    def send() -> str:
        api = HfApi(library_name="se-inject")
        made = api.create_repo(repo, exist_ok=True)
        wanted = [name for name in names if name != card or not api.file_exists(made.repo_id, card)]
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=wanted,
            commit_message="Add SE blocks",
        )
        return str(made)

    return _ask(send, ExportError, f"{folder} is written, and cannot be put on the Hub as {repo!r}")


def _ask(ask: Callable[[], T], kind: type[SEInjectError], what: str) -> T:
    try:
        return ask()
    except Exception as error:  # the client and the HTTP library below it raise many kinds
        said: Any = first_line(error).rstrip(".: ")
        raise kind(f"{what} ({type(error).__name__}: {said}).") from error
