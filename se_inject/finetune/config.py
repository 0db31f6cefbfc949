"""``config.json``: the settings of a run, kept in its folder."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from se_inject.errors import ArgumentError, first_line
from se_inject.finetune.settings import Settings
from se_inject.keep.atomic import atomic_write
from se_inject.names import near_names

CONFIG = "config.json"

# "No glob" is None in Python and an empty list in the file.
_GLOBS = ("include", "exclude")

# Names that older versions wrote.
_RENAMED = {"warmup_epochs": "freeze_epochs"}

_WAY_OUT = "Put it right, or begin anew with --output another folder."


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings in the order of the command line: the model and its data come first."""
    data = dataclasses.asdict(settings)
    names = [field.name for field in dataclasses.fields(settings)]
    first = names.index("model")
    data = {name: data[name] for name in (*names[first:], *names[:first])}
    for name in _GLOBS:
        globs = data[name] or ()
        data[name] = [globs] if isinstance(globs, str) else list(globs)
    return data


def write_config(settings: Settings, folder: Path) -> None:
    with atomic_write(folder / CONFIG) as part:
        part.write_text(json.dumps(to_dict(settings), indent=2) + "\n")


def read_config(folder: Path) -> Settings:
    """The settings of the run in a folder.

    Raises:
        ArgumentError: the folder has no run, or its configuration is damaged.
    """
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"{folder} is no run folder: it has no {CONFIG}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is damaged ({first_line(error)}). {_WAY_OUT}") from error
    return settings_from(data, path)


def settings_from(data: Any, path: Path) -> Settings:
    """The settings that a file has by name.

    Raises:
        ArgumentError: a name or a value is none of this version; the message names it.
    """
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{path} is damaged (it has no settings by name). {_WAY_OUT}")
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for old_name, value in data.items():
        name = _RENAMED.get(old_name, old_name)
        if name not in hints:
            raise ArgumentError(
                f"{path}: {name!r} is no setting of this version; there are"
                f" {near_names(str(name), list(hints))}. {_WAY_OUT}"
            )
        if not fits(value, hints[name]):
            raise ArgumentError(
                f"{path}: {name} is {value!r:.60}, and must be {_words(hints[name])}. {_WAY_OUT}"
            )
        values[name] = value
    if "model" not in values:
        raise ArgumentError(f"{path} is damaged (it has no model). {_WAY_OUT}")
    globs = {name: tuple(values.get(name) or ()) or None for name in _GLOBS}
    return Settings(**{**values, **globs})


def fits(value: Any, hint: Any) -> bool:
    """Whether a value as JSON has it is one of a type of the settings."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if kind is Sequence:
        return isinstance(value, list | tuple) and all(fits(v, arguments[0]) for v in value)
    if kind is Mapping:
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool)  # True is an int of Python
    return hint in (str, bool, type(None)) and isinstance(value, hint)


def _words(hint: Any) -> str:
    """``Literal["a", "b"] | None`` -> one of a, b or null."""
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(arguments)}"
    if kind in (Union, types.UnionType):
        return " or ".join(filter(None, map(_words, arguments)))
    return _WORDS.get(kind or hint, "")


_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    Sequence: "a list of texts",
    Mapping: "numbers by glob",
}
