"""``config.json``: the settings of a run, kept in its folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from se_inject.errors import ArgumentError
from se_inject.finetune.settings import Settings
from se_inject.keep.atomic import atomic_write

CONFIG = "config.json"

# "No glob" is None in Python and an empty list in the file.
_GLOBS = ("include", "exclude")

# Names that older versions wrote.
_RENAMED = {"warmup_epochs": "freeze_epochs"}


def write_config(settings: Settings, folder: Path) -> None:
    """Write the settings in the order of the command line: the model and its data come first."""
    data = dataclasses.asdict(settings)
    names = [field.name for field in dataclasses.fields(settings)]
    first = names.index("model")
    data = {name: data[name] for name in (*names[first:], *names[:first])}
    for name in _GLOBS:
        globs = data[name] or ()
        data[name] = [globs] if isinstance(globs, str) else list(globs)
    with atomic_write(folder / CONFIG) as part:
        part.write_text(json.dumps(data, indent=2) + "\n")


def read_config(folder: Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
        ArgumentError: the folder has no run, or its configuration is damaged.
    """
    path = folder / CONFIG
    try:
        data: Mapping[str, Any] = json.loads(path.read_text())
        data = {_RENAMED.get(name, name): value for name, value in data.items()}
        globs = {name: tuple(data[name]) or None for name in _GLOBS}
        return Settings(**{**data, **globs})
    except FileNotFoundError:
        raise ArgumentError(f"{folder} is no run folder: it has no {CONFIG}.") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"{path} is damaged ({error}).") from error
