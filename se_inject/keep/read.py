"""Reading a file of ``save_se``: its header, and its tensors if they are wanted.

Reading executes nothing: a safetensors file holds bytes and JSON.
"""

import json
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
        ForeignFileError: the file is whole, and not one of save_se.
    """
    return read_file(path, tensors=False)[0]


def read_file(path: Path, *, tensors: bool = True) -> tuple[Header, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A file of somebody else's may be large: its header tells before its tensors are read.
            header = _parse(metadata[HEADER_KEY], path) if HEADER_KEY in metadata else None
            keys = file.offset_keys() if header and tensors else ()
            values = {key: file.get_tensor(key) for key in keys}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a whole .safetensors file ({error}). It may be truncated, or no"
            " checkpoint at all."
        ) from error
    if header is None:
        raise ForeignFileError(
            f"{path}: a .safetensors file, but not one of save_se. load_se reads SE blocks; whole"
            " networks load with safetensors.torch.load_model."
        )
    return header, values


def _parse(text: str, path: Path) -> Header:
    try:
        data = json.loads(text)
        version, number = data["version"], data["format"]
        if type(number) is not int:
            raise TypeError(f"format {number!r}")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r}).") from error
    if not 1 <= number <= FORMAT:
        older = number < 1
        raise CheckpointError(
            f"{path}: made by se-inject {version} in format {number}; this is"
            f" {metadata.version('se-inject')}, format"
            f" {FORMAT}. {'Load it with that version.' if older else 'Upgrade se-inject.'}"
        )
    try:
        return Header(
            version=version,
            model=data["model"],
            sites=tuple(map(_parse_site, data["sites"])),
            examples=tuple(None if e is None else _decode(e) for e in data["examples"]),
            modules={str(k): str(v) for k, v in data["modules"].items()},
            base={str(k): (str(v[0]), list(v[1]), v[2]) for k, v in data["base"].items()},
        )
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r}).") from error


def _parse_site(data: Any) -> SavedSite:
    own = dict(data["settings"])
    custom, example = own.pop("custom"), own.pop("example")
    where = own.pop("where", "residual")
    settings = SharedSettings(Variant(**own), custom, example, where)
    site = SavedSite(**{**data, "settings": settings})
    if not isinstance(site.block, str) or not isinstance(site.child, str):
        raise TypeError(f"a name in {(site.block, site.child)}")
    numbers = (site.r, example, site.channels, site.bottleneck)
    if not all(n is None or type(n) is int for n in numbers) or None in numbers[:2]:
        raise TypeError(f"a number in {numbers}")
    for option in fields(Variant):  # unknown names are refused where the blocks are planned
        if type(getattr(settings.variant, option.name)) is not type(option.default):
            raise TypeError(f"{option.name} {getattr(settings.variant, option.name)!r}")
    if not isinstance(where, str):  # an unknown word is refused where the blocks are planned
        raise TypeError(f"where {where!r}")
    if type(custom) is not bool:
        raise TypeError(f"custom {custom!r}")
    return site


def _decode(value: Any) -> Any:
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        return torch.empty(value["tensor"], dtype=dtype, device="meta")
    if "list" in value:
        return [_decode(v) for v in value["list"]]
    if "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    if "dict" in value:
        return {k: _decode(v) for k, v in value["dict"]}
    return value["value"]
