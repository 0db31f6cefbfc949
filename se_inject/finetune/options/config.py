"""``config.json``: the settings of a run, kept in its folder."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from se_inject.errors import ArgumentError, first_line
from se_inject.finetune.options.settings import Settings
from se_inject.keep.atomic import atomic_write
from se_inject.names import near_names

CONFIG, CONFIG_YAML = "config.json", "config.yaml"

# Where the user gives none of these, the field is None in Python and an empty list in the file.
_LISTS = ("include", "exclude", "logger")

# Names that older versions wrote, and what they are called now.
_RENAMED = {"warmup_epochs": "freeze_epochs"}

_WAY_OUT = "Correct it, or begin a new run with another --output folder."


def to_dict(settings: Settings) -> dict[str, Any]:
    """The settings in the order of the command line: the model and its data come first."""
    data = dataclasses.asdict(settings)
    data = {"model": data.pop("model"), **data}
    for name in _LISTS:
        values = data[name] or ()
        data[name] = [values] if isinstance(values, str) else list(values)
    return data


def write_config(settings: Settings, folder: Path) -> None:
    """Write the settings as JSON for ``--resume``, and as YAML for ``--config`` of another run."""
    data = to_dict(settings)
    with atomic_write(folder / CONFIG) as part:
        part.write_text(json.dumps(data, indent=2) + "\n")
    with atomic_write(folder / CONFIG_YAML) as part:
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
        about = f"# Begin another run from this file with --config. --resume reads {CONFIG}."
        part.write_text(f"{about}\n{text}")


def read_config(folder: Path) -> Settings:
    """Read the settings of the run in a folder.

    Raises:
        ArgumentError: the folder has no run, or its configuration is damaged.
    """
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ArgumentError(f"{folder} is not a run folder, because it has no {CONFIG}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{path} is damaged ({first_line(error)}). {_WAY_OUT}") from error
    values = _checked(data, path, _WAY_OUT)
    if "model" not in values:
        raise ArgumentError(f"{path} is damaged (it has no model). {_WAY_OUT}")
    return Settings(**values)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read settings by name from a file for ``--config``, which need not have all of them.

    Raises:
        ArgumentError: the file cannot be read, or it has a name or value that no setting has.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ArgumentError(f"--config {path} cannot be read ({first_line(error)}).") from error
    hints = typing.get_type_hints(Settings)
    if isinstance(data, dict):  # YAML reads 1e-3 as a text, because its numbers need a point
        data = {name: _as_number(value, hints.get(name)) for name, value in data.items()}
    return _checked(data, path, "Correct it.")


def _as_number(value: Any, hint: Any) -> Any:
    if not isinstance(value, str) or float not in (hint, *typing.get_args(hint)):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _checked(data: Any, path: Path, way_out: str) -> dict[str, Any]:
    """Check that this version knows the names and values of a file, and return them by name."""
    if not isinstance(data, Mapping):
        raise ArgumentError(f"{path} is damaged (it has no settings by name). {way_out}")
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for old_name, value in data.items():
        name = _RENAMED.get(old_name, old_name)
        if name not in hints:
            raise ArgumentError(
                f"{path}: {name!r} is not a setting of this version. Near names:"
                f" {near_names(str(name), list(hints))}. {way_out}"
            )
        if not fits(value, hints[name]):
            raise ArgumentError(
                f"{path}: {name} is {value!r:.60}, but must be {_words(hints[name])}. {way_out}"
            )
        values[name] = _listed(value) if name in _LISTS else value
    return values


def _listed(value: Any) -> tuple[str, ...] | None:
    return (value,) if isinstance(value, str) else tuple(value or ()) or None


def fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from a file fits the type of a setting."""
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
        return isinstance(value, kinds) and not isinstance(value, bool)  # True is an int in Python
    return hint in (str, bool, type(None)) and isinstance(value, hint)


def _words(hint: Any) -> str:
    """Describe a type in words: ``Literal["a", "b"] | None`` is "one of a, b or null"."""
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
