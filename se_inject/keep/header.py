"""What a file of ``save_se`` says beside its tensors, and reading it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from se_inject.edit.block_class import Edit, edit_of
from se_inject.errors import CheckpointError
from se_inject.graph.record import Arguments
from se_inject.keep.fingerprint import dtype_name, hash_of, tensors_of
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.sites.scaled import Where

# Format 1 had no squeeze, gate and bias: its blocks are the standard ones, the defaults. Formats 1
# and 2 knew residual branches only.
FORMAT = 3


HEADER_KEY = "se_inject"


@dataclass(frozen=True)
class SharedSettings:
    """What all sites of one ``inject_se`` call share."""

    variant: Variant
    custom: bool  # made by a user's se_layer
    example: int  # which of the header's examples the forward was recorded with
    where: Where = "residual"


@dataclass(frozen=True)
class SavedSite:
    block: str
    child: str
    r: int
    channels: int | None  # None: of a user's se_layer, which need not say
    bottleneck: int | None
    settings: SharedSettings

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["settings"] |= data["settings"].pop("variant")
        return data


@dataclass(frozen=True)
class Header:
    """What a file of :func:`save_se` says beside its tensors."""

    version: str
    model: str
    sites: tuple[SavedSite, ...]
    examples: tuple[Any, ...]  # as example_input takes them; None: it could not be written down
    modules: Mapping[str, str]  # name -> hash of what its repr says, such as eps
    base: Mapping[str, Sequence[Any]]  # name -> dtype, shape, hash or None

    @property
    def frozen(self) -> list[str]:
        """The tensors of the base that are not in the file: the base has to bring them."""
        return [key for key, (*_, digest) in self.base.items() if digest]

    def differing(self, base: nn.Module) -> list[str]:
        """The frozen tensors that have other values in ``base``, or are not there."""
        state = tensors_of(base)
        return [
            key
            for key in self.frozen
            if key not in state or state[key].is_meta or hash_of(state[key]) != self.base[key][2]
        ]

    def groups(self) -> dict[SharedSettings, list[SavedSite]]:
        groups: dict[SharedSettings, list[SavedSite]] = {}
        for site in self.sites:
            groups.setdefault(site.settings, []).append(site)
        return groups


def saved_sites(model: nn.Module, examples: list[Any]) -> list[SavedSite]:
    """The SE blocks of a model, and in ``examples`` what its forwards were recorded with.

    A block that is reached by two names counts once.
    """
    return [
        _site(name, module, edit, child, r, examples)
        for name, module in model.named_modules()
        if (edit := edit_of(module))
        for child, r in zip(edit.children, edit.settings.r, strict=True)
    ]


def _site(
    name: str, module: nn.Module, edit: Edit, child: str, r: int, examples: list[Any]
) -> SavedSite:
    layer = getattr(module, child)
    settings = edit.settings
    example = _encode_example(settings.example)
    if example not in examples:
        examples.append(example)
    ours = isinstance(layer, SqueezeExcite) and not settings.custom
    return SavedSite(
        block=name,
        child=child,
        r=r,
        channels=layer.channels if ours else None,
        bottleneck=layer.bottleneck if ours else None,
        settings=SharedSettings(
            # Its init is another once its gate is folded. Of a layer of the user's own, only the
            # placement is ours.
            variant=replace(settings.variant, init=layer.init)
            if ours
            else Variant(settings.variant.placement),
            custom=not ours,
            example=examples.index(example),
            where=settings.where,
        ),
    )


def _encode_example(example: Arguments) -> Any:
    """As ``example_input`` takes it: positional or keyword arguments."""
    args, kwargs = example
    try:
        return _encode(kwargs or args)
    except TypeError:  # no JSON for it: load_se will ask for an example_input
        return None


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": dtype_name(value)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_encode(v) for v in value]}
    if type(value) is dict:
        return {"dict": [[k, _encode(v)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(type(value).__name__)


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


def read_header(path: Path) -> Header:
    """Read what a file says, without its tensors.

    Raises:
        CheckpointError: the file is damaged, foreign or of another version.
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
        raise CheckpointError(
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
