"""Reads a file of ``save_se``: its header, and its tensors if they are wanted.

Reading executes nothing, because a safetensors file holds only bytes and JSON.
"""

import json
import math
import stat
from collections.abc import Sequence
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from se_inject.errors import CheckpointError, ForeignFileError
from se_inject.keep.header import FORMAT, HEADER_KEY, Header, SavedSite, SharedSettings
from se_inject.layers.variant import Variant


def read_header(path: Path) -> Header:
    """Read what a file says, without its tensors.

    Raises:
        CheckpointError: the file is damaged or of another version.
        ForeignFileError: the file is intact, but save_se did not write it.
    """
    return read_file(path, tensors=False)[0]


def read_file(path: Path, *, tensors: bool = True) -> tuple[Header, dict[str, Tensor]]:
    """Read what a file says, and its tensors if they are wanted."""
    shown = printable(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep the reader waiting
            raise CheckpointError(f"{shown} is no regular file.")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Somebody else's file may be large. Its header is looked at before its tensors are.
            header = _parse(metadata[HEADER_KEY], shown) if HEADER_KEY in metadata else None
            keys = file.offset_keys() if header else ()
            if header:
                shapes = {key: list(file.get_slice(key).get_shape()) for key in keys}
                _check_widths(header, shapes, shown)
            values = {key: file.get_tensor(key) for key in keys} if tensors else {}
    except FileNotFoundError:
        raise CheckpointError(f"{shown}: there is no such file.") from None
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{shown}: not a whole .safetensors file ({printable(error)}). It may be truncated, or"
            " no checkpoint at all."
        ) from error
    if header is None:
        raise ForeignFileError(
            f"{shown}: a .safetensors file, but not one of save_se. load_se reads SE blocks; whole"
            " networks load with safetensors.torch.load_model."
        )
    return header, values


def printable(value: object) -> str:
    """A text from a file, or about one, made safe to show: one line of bounded length."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))
    return text if len(text) <= 300 else f"{text[:300]}..."


# The limits of a header. They are far more than any network has, and small enough to be harmless.
_MOST_SITES = 100_000
_LARGEST = 2**31 - 1  # the largest width, ratio or size
_LARGEST_EXAMPLE = 2**40  # in elements; examples are on meta and take no memory
_LONGEST = 500  # the longest name, in characters
_DEEPEST = 50  # how deeply an example may be nested

_DAMAGE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OverflowError,
    RecursionError,
)


def _damaged(shown: str, error: object) -> CheckpointError:
    said = repr(error) if isinstance(error, BaseException) else str(error)
    return CheckpointError(f"{shown}: its header is damaged ({printable(said)}).")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which each key comes once. Of two values, nobody knows which one counts."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _parse(text: str, shown: str) -> Header:
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
        version, number = data["version"], data["format"]
        if type(number) is not int or not isinstance(version, str):
            raise TypeError(f"format {number!r}")
    except _DAMAGE as error:
        raise _damaged(shown, error) from error
    if not 1 <= number <= FORMAT:
        older = number < 1
        raise CheckpointError(
            f"{shown}: made by se-inject {printable(version)} in format {printable(number)}; this"
            f" is {metadata.version('se-inject')}, format"
            f" {FORMAT}. {'Load it with that version.' if older else 'Upgrade se-inject.'}"
        )
    try:
        if not isinstance(data["model"], str):
            raise TypeError("the name of the model")
        for name in ("modules", "base"):
            if not isinstance(data[name], dict):
                raise TypeError(f"{name} is no dict")
        sites, examples = _parse_sites(data)
        header = Header(
            version=version,
            model=printable(data["model"]),
            sites=sites,
            examples=examples,
            modules={k: str(v) for k, v in data["modules"].items()},
            base={k: _parse_tensor(v) for k, v in data["base"].items()},
        )
    except _DAMAGE as error:
        raise _damaged(shown, error) from error
    return header


def parse_plan(data: Any, shown: str) -> tuple[tuple[SavedSite, ...], tuple[Any, ...]]:
    """The sites and the examples of a plan that was kept as JSON beside a model.

    Raises:
        CheckpointError: the plan is damaged or of another version.
    """
    try:
        if type(data["format"]) is not int or not 1 <= data["format"] <= FORMAT:
            raise ValueError(f"its format is {data['format']!r}, and this version knows {FORMAT}")
        return _parse_sites(data)
    except _DAMAGE as error:
        said = repr(error) if isinstance(error, BaseException) else str(error)
        raise CheckpointError(f"{shown} is damaged ({printable(said)}).") from error


def _parse_sites(data: Any) -> tuple[tuple[SavedSite, ...], tuple[Any, ...]]:
    for name in ("sites", "examples"):
        if not isinstance(data[name], list):
            raise TypeError(f"{name} is no list")
    if len(data["sites"]) > _MOST_SITES:
        raise ValueError(f"{len(data['sites'])} sites")
    sites = tuple(_parse_site(site, data["format"]) for site in data["sites"])
    examples = tuple(None if e is None else _decode(e, 0) for e in data["examples"])
    _check_sites(sites, examples)
    return sites, examples


def _parse_tensor(entry: Any) -> tuple[str, list[int], str | None]:
    dtype, shape, digest = entry
    if not isinstance(dtype, str) or not (digest is None or isinstance(digest, str)):
        raise TypeError(f"the entry {entry!r}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"the shape {shape!r}")
    return dtype, shape, digest


def _parse_site(data: Any, number: int) -> SavedSite:
    own = dict(data["settings"])
    custom, example = own.pop("custom"), own.pop("example")
    if custom is True and number < 4:  # in these formats no layer was in an IdentityStart
        own["init"] = "paper"
    where = own.pop("where", "residual")
    settings = SharedSettings(Variant(**own), custom, example, where)
    site = SavedSite(**{**data, "settings": settings})
    if not isinstance(site.block, str) or not isinstance(site.child, str):
        raise TypeError(f"a name in {(site.block, site.child)}")
    if not site.child.isidentifier():
        raise ValueError(f"the child {site.child!r}")
    texts = (site.block, site.child, *map(str, vars(settings.variant).values()))
    if max(map(len, texts)) > _LONGEST:
        raise ValueError("a name that is too long")
    for option in fields(Variant):  # unknown names are refused where the blocks are planned
        if type(getattr(settings.variant, option.name)) is not type(option.default):
            raise TypeError(f"{option.name} {getattr(settings.variant, option.name)!r}")
    if not isinstance(where, str):  # an unknown word is refused where the blocks are planned
        raise TypeError(f"where {where!r}")
    if type(custom) is not bool:
        raise TypeError(f"custom {custom!r}")
    widths = [n for n in (site.channels, site.bottleneck) if n is not None]
    for number in (site.r, settings.variant.divisor, *widths):
        if type(number) is not int or not 1 <= number <= _LARGEST:
            raise ValueError(f"the number {number!r}")
    if not custom and len(widths) < 2:
        raise TypeError("a block without widths")
    return site


def _check_sites(sites: Sequence[SavedSite], examples: Sequence[Any]) -> None:
    for site in sites:
        example = site.settings.example
        if type(example) is not int or not 0 <= example < len(examples):
            raise ValueError(f"the example {example!r} of {len(examples)}")
    if len({(site.block, site.child) for site in sites}) < len(sites):
        raise ValueError("a site comes twice")
    if not sites:
        raise ValueError("no sites")


def _check_widths(header: Header, shapes: dict[str, list[int]], shown: str) -> None:
    """Compare the widths in the header with the tensors, before anything so large is built."""
    for site in header.sites:
        key = f"{site.block}.{site.child}.fc1.weight".lstrip(".")
        shape = shapes.get(key)  # A missing tensor becomes an error later, when the sites fit.
        if site.settings.custom or shape is None or shape[:2] == [site.bottleneck, site.channels]:
            continue
        raise CheckpointError(
            f"{shown}: its header says that the SE block of {site.block!r} has widths"
            f" {(site.channels, site.bottleneck)}, and here it is {tuple(shape[1::-1])}."
        )


def _decode(value: Any, depth: int) -> Any:
    if depth > _DEEPEST:
        raise ValueError("an example nested too deeply")
    if not isinstance(value, dict):
        raise TypeError(f"the example {value!r}")
    if "tensor" in value:
        return _decode_tensor(value["tensor"], value["dtype"])
    if "list" in value:
        return [_decode(v, depth + 1) for v in value["list"]]
    if "tuple" in value:
        return tuple(_decode(v, depth + 1) for v in value["tuple"])
    if "dict" in value:
        return {k: _decode(v, depth + 1) for k, v in value["dict"]}
    found = value["value"]
    if not (found is None or isinstance(found, bool | int | float | str)):
        raise TypeError(f"the value {found!r}")
    return found


def _decode_tensor(shape: Any, name: Any) -> Tensor:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, list):
        raise TypeError(f"a tensor {shape!r} of {name!r}")
    if not all(type(n) is int and 0 <= n <= _LARGEST for n in shape):
        raise ValueError(f"the shape {shape!r}")
    if math.prod(shape) > _LARGEST_EXAMPLE:
        raise ValueError(f"the shape {shape!r}")
    return torch.empty(shape, dtype=dtype, device="meta")
