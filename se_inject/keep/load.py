"""Small checkpoints: the SE tensors and the whole plan, in one ``.safetensors`` file.

The tensors are named as in the model's ``state_dict``. The header's ``se_inject`` entry is JSON:
the sites with their settings, what the recorded forward was given, and a fingerprint of the base
network, tensor by tensor, so that a file never goes silently onto another base. Reading executes
nothing: safetensors holds bytes and JSON.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from se_inject.edit.block_class import Edit, edit_of
from se_inject.edit.insert import remove_se
from se_inject.errors import CheckpointError, NoSiteError, SEInjectError
from se_inject.graph.record import Arguments, block_label
from se_inject.keep.atomic import replacing
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.plan.checks import check_model
from se_inject.plan.planner import Patterns, Plan, SELayer, matching, plan_se

# Format 1 had no squeeze, gate and bias: its blocks are the standard ones, the defaults.
FORMAT = 2
_KEY = "se_inject"
# Count training steps and nothing else: a base that has seen more batches is the same base.
_COUNTERS = "num_batches_tracked"


def save_se(model: nn.Module, path: str | os.PathLike[str], *, extra: Patterns = None) -> None:
    """Write the SE blocks of ``model`` to one ``.safetensors`` file.

    Args:
        model: an injected model, not wrapped for distributed runs and not sharded.
        path: the file; it is replaced as a whole or not at all, whatever happens on the way.
        extra: what else goes into the file: a glob or globs on ``state_dict`` keys
            (``"head.*"``), or ``"trained"`` for every tensor that can have changed: trainable
            parameters and the statistics of norms. Without it, the file is right only for a base
            whose own tensors have stayed as they were.

    Raises:
        NoSiteError: the model has no SE block.
        ArgumentError: a glob of ``extra`` matches no tensor.
        UnsupportedModelError: the model is wrapped, compiled or sharded.
    """
    check_model(model)
    state = _tensors(model)
    examples: list[Any] = []
    sites = _sites(model, examples)
    if not sites:
        raise NoSiteError(
            f"{type(model).__name__} has no SE block to save; inject_se(model) makes them."
        )
    if lost := [key for key in model.state_dict() if key not in state]:
        warnings.warn(
            f"{_some(lost)} comes from get_extra_state and is not saved: safetensors holds the"
            " tensors of modules only.",
            stacklevel=2,
        )
    ours = _se_keys(model, state)
    base = [key for key in state if key not in ours]
    kept = _extra(model, base, extra)
    header = {
        "format": FORMAT,
        "version": _version(),
        "model": type(model).__name__,
        "sites": [site.to_dict() for site in sites],
        "examples": examples,
        "modules": _modules(model),
        "base": {key: _fingerprint(key, state[key], hashed=key not in kept) for key in base},
    }
    # Cloned: tensors that share memory are refused, and each key is to be whole by itself.
    tensors = {
        key: state[key].detach().clone(memory_format=torch.contiguous_format)
        for key in (*ours, *kept)
    }
    with replacing(Path(path)) as part:
        part.write_bytes(save(tensors, metadata={_KEY: json.dumps(header)}))


def load_se(
    base: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_input: Any = None,
    se_layer: SELayer | None = None,
) -> nn.Module:
    """Inject into ``base`` what a file of :func:`save_se` says, in place, and return the model.

    Outputs are then equal to those of the saved model, unless a warning says that a module of
    the base has another class or setting, such as eps. If anything fails, ``base`` is as it was.

    Args:
        base: the network that the saved one was made from, with its weights, without SE blocks.
        example_input: as in :func:`plan_se`; only for a forward whose arguments no file can hold.
        se_layer: what the saved model was injected with, if it was: code is in no checkpoint.

    Raises:
        CheckpointError: the file is damaged, foreign or of another version, or ``base`` is not
            the network that it was made for; the message names the first differences.
    """
    header, tensors = _read(Path(path))
    _check_base(base, header, path)
    if None in header.examples and example_input is None:
        raise CheckpointError(
            f"{path}: the file cannot say what the forward takes. Pass example_input= as you did"
            " to inject_se."
        )
    examples = [
        _like(base, example) if example_input is None else example_input
        for example in header.examples
    ]
    own = {key: tensor for key, tensor in _tensors(base).items() if key in tensors}
    before = {key: tensor.clone() for key, tensor in own.items()}
    try:
        for settings, sites in header.groups().items():
            plan = _plan(base, settings, sites, examples[settings.example], se_layer, path)
            plan.apply()
        _fill(base, tensors, path)
    except BaseException:
        if any(edit_of(module) for module in base.modules()):
            remove_se(base)
        with torch.no_grad():
            for key, tensor in before.items():
                own[key].copy_(tensor)
        raise
    return base


# --- what is in a file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Settings:
    """What all sites of one ``inject_se`` call share."""

    variant: Variant
    custom: bool  # made by a user's se_layer
    example: int  # which of the header's examples the forward was recorded with


@dataclass(frozen=True)
class _Site:
    block: str
    child: str
    r: int
    channels: int | None  # None: of a user's se_layer, which need not say
    bottleneck: int | None
    settings: _Settings

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["settings"] |= data["settings"].pop("variant")
        return data


@dataclass(frozen=True)
class Header:
    """What a file of :func:`save_se` says beside its tensors."""

    version: str
    model: str
    sites: tuple[_Site, ...]
    examples: tuple[Any, ...]  # as example_input takes them; None: it could not be written down
    modules: Mapping[str, str]  # name -> hash of what its repr says, such as eps
    base: Mapping[str, Sequence[Any]]  # name -> dtype, shape, hash or None

    @property
    def frozen(self) -> list[str]:
        """The tensors of the base that are not in the file: the base has to bring them."""
        return [key for key, (*_, digest) in self.base.items() if digest]

    def differing(self, base: nn.Module) -> list[str]:
        """The frozen tensors that have other values in ``base``, or are not there."""
        state = _tensors(base)
        return [
            key
            for key in self.frozen
            if key not in state or state[key].is_meta or _hash(state[key]) != self.base[key][2]
        ]

    def groups(self) -> dict[_Settings, list[_Site]]:
        groups: dict[_Settings, list[_Site]] = {}
        for site in self.sites:
            groups.setdefault(site.settings, []).append(site)
        return groups


def _sites(model: nn.Module, examples: list[Any]) -> list[_Site]:
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
) -> _Site:
    layer = getattr(module, child)
    settings = edit.settings
    example = _encode_example(settings.example)
    if example not in examples:
        examples.append(example)
    ours = isinstance(layer, SqueezeExcite) and not settings.custom
    return _Site(
        block=name,
        child=child,
        r=r,
        channels=layer.channels if ours else None,
        bottleneck=layer.bottleneck if ours else None,
        settings=_Settings(
            # Its init is another once its gate is folded. Of a layer of the user's own, only the
            # placement is ours.
            variant=replace(settings.variant, init=layer.init)
            if ours
            else Variant(settings.variant.placement),
            custom=not ours,
            example=examples.index(example),
        ),
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the ``state_dict``, without what a ``get_extra_state`` adds."""
    return {
        key: value
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor) and not key.endswith("_extra_state")
    }


def _se_keys(model: nn.Module, state: Iterable[str]) -> list[str]:
    """The keys of the SE blocks, under all names that a block has."""
    prefixes = tuple(
        f"{name}.{child}.".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if (edit := edit_of(module))
        for child in edit.children
    )
    return [key for key in state if key.startswith(prefixes)]


def _modules(model: nn.Module) -> dict[str, str]:
    """A hash of what each module of the base says of itself: its class, eps, stride, ..."""
    ours = [
        id(module.get_submodule(child))
        for module in model.modules()
        if (edit := edit_of(module))
        for child in edit.children
    ]
    inside = {id(m) for module in model.modules() if id(module) in ours for m in module.modules()}
    said = {}
    for name, module in model.named_modules():
        if id(module) not in inside:
            edit = edit_of(module)
            kind = (edit.base if edit else type(module)).__qualname__
            text = f"{kind}({module.extra_repr()})"
            said[name] = hashlib.sha256(text.encode()).hexdigest()[:8]
    return said


def _extra(model: nn.Module, base: Sequence[str], extra: Patterns) -> set[str]:
    if extra is None:
        return set()
    if extra != "trained":
        return matching(base, extra, "extra", "tensor of the base")
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    # All statistics, spectral norm's vectors too; whole numbers are tables or counters.
    names |= {
        name
        for name, b in model.named_buffers(remove_duplicate=False)
        if b.is_floating_point() or name.endswith(_COUNTERS)
    }
    return names & set(base)


def _fingerprint(key: str, tensor: Tensor, *, hashed: bool) -> list[Any]:
    same = hashed and not key.endswith(_COUNTERS)
    return [_dtype(tensor), list(tensor.shape), _hash(tensor) if same else None]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hash(tensor: Tensor) -> str:
    """Of the bytes; 64 bits, against mistakes and not against forgers."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


def _version() -> str:
    from se_inject import __version__

    return __version__


def _encode_example(example: Arguments) -> Any:
    """As ``example_input`` takes it: positional or keyword arguments."""
    args, kwargs = example
    try:
        return _encode(kwargs or args)
    except TypeError:  # no JSON for it: load_se will ask for an example_input
        return None


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape), "dtype": _dtype(value)}
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


# --- reading -------------------------------------------------------------------------


def read_header(path: Path) -> Header:
    """Read what a file says, without its tensors.

    Raises:
        CheckpointError: the file is damaged, foreign or of another version.
    """
    return _read(path, tensors=False)[0]


def _read(path: Path, *, tensors: bool = True) -> tuple[Header, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A file of somebody else's may be large: its header tells before its tensors are read.
            header = _parse(metadata[_KEY], path) if _KEY in metadata else None
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
            f"{path}: made by se-inject {version} in format {number}; this is {_version()}, format"
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


def _parse_site(data: Any) -> _Site:
    own = dict(data["settings"])
    custom, example = own.pop("custom"), own.pop("example")
    settings = _Settings(Variant(**own), custom, example)
    site = _Site(**{**data, "settings": settings})
    if not isinstance(site.block, str) or not isinstance(site.child, str):
        raise TypeError(f"a name in {(site.block, site.child)}")
    numbers = (site.r, example, site.channels, site.bottleneck)
    if not all(n is None or type(n) is int for n in numbers) or None in numbers[:2]:
        raise TypeError(f"a number in {numbers}")
    for option in fields(Variant):  # unknown names are refused where the blocks are planned
        if type(getattr(settings.variant, option.name)) is not type(option.default):
            raise TypeError(f"{option.name} {getattr(settings.variant, option.name)!r}")
    if type(custom) is not bool:
        raise TypeError(f"custom {custom!r}")
    return site


# --- onto a base ---------------------------------------------------------------------------------


def _check_base(base: nn.Module, header: Header, path: Any) -> None:
    """Raise unless ``base`` is the network that the file was made for, to the last bit."""
    check_model(base)
    if any(edit_of(module) for module in base.modules()):
        raise CheckpointError(
            f"{type(base).__name__} has SE blocks already. load_se puts its own into a plain base:"
            " remove_se(model) first."
        )
    state = _tensors(base)
    made_for = f"{path} was made for another base ({header.model})"
    absent = [key for key in header.base if key not in state]
    unknown = [key for key in state if key not in header.base]
    if absent or unknown:
        kind, keys = ("has no", absent) if absent else ("also has", unknown)
        raise CheckpointError(f"{made_for}: this {type(base).__name__} {kind} {_some(keys)}.")
    for key, (dtype, shape, _) in header.base.items():
        own = state[key]
        if list(own.shape) != list(shape):
            raise CheckpointError(
                f"{made_for}: {key} is {list(shape)} there and {list(own.shape)} here. Build the"
                " base with the same arguments (num_classes, ...)."
            )
        if _dtype(own) != dtype:
            raise CheckpointError(
                f"{made_for}: {key} is {dtype} there and {_dtype(own)} here. Convert the base."
            )
        if own.is_meta:
            raise CheckpointError(
                f"{key} of the base is on the meta device and has no values. Load the base first."
            )
    differing = header.differing(base)
    if differing:
        raise CheckpointError(
            f"{path}: {len(differing)} of {len(state)} tensors of the base have other values:"
            f" {_some(differing)}. Load the base's own weights first; what was trained beside the"
            ' SE blocks must be in the file: save_se(..., extra="trained").'
        )
    modules = _modules(base)
    if changed := [name for name, said in header.modules.items() if modules.get(name) != said]:
        warnings.warn(
            f"{path}: the weights fit, but {block_label(changed[0])} of this base has another class"
            f" or setting, such as eps ({len(changed)} modules have). Outputs may differ.",
            stacklevel=3,
        )


def _like(base: nn.Module, example: Any) -> Any:
    """The example in the dtype of the base, which may have been converted since the injection."""
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)

    def convert(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return pytree.tree_map(convert, example)


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(map(repr, keys[:3])) + more


def _plan(
    base: nn.Module,
    settings: _Settings,
    sites: Sequence[_Site],
    example: Any,
    se_layer: SELayer | None,
    path: Any,
) -> Plan:
    if settings.custom and se_layer is None:
        raise CheckpointError(
            f"{path} was saved from a model with another se_layer. Pass that to load_se too:"
            " load_se(base, path, se_layer=...), or --attention NAME."
        )
    blocks = {site.block: site for site in sites}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when the model was injected
            plan = plan_se(
                base,
                {_literal(block): site.r for block, site in blocks.items()},
                example_input=example,
                include=[_literal(block) for block in blocks],
                **vars(settings.variant),  # checked there
                se_layer=se_layer if settings.custom else None,
            )
    except SEInjectError as error:
        raise CheckpointError(f"{path} does not fit this base: {error}") from error
    found = {(s.block, s.child): (s.channels, s.bottleneck) for s in plan.sites}
    for site in sites:
        here = found.pop((site.block, site.child), None)
        there = (site.channels, site.bottleneck)
        if here is None or (not settings.custom and here != there):
            raise CheckpointError(
                f"{path} does not fit this base: its SE block in {block_label(site.block)} has"
                f" widths {there}, and here it is {here or 'nowhere'}."
            )
    if found:
        (block, _), *_ = found
        raise CheckpointError(
            f"{path} does not fit this base: it has no SE block for {block_label(block)}."
        )
    return plan


def _literal(name: str) -> str:
    """A glob that matches only ``name``."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Any) -> None:
    state = _tensors(model)
    missing = [key for key in _se_keys(model, state) if key not in tensors]
    foreign = [key for key in tensors if key not in state]
    if missing or foreign:
        raise CheckpointError(
            f"{path}: the file lacks {_some(missing)}."
            if missing
            else f"{path}: the file has {_some(foreign)}, which the model has not."
        )
    for key, tensor in tensors.items():
        there, here = ((list(t.shape), _dtype(t)) for t in (tensor, state[key]))
        if there != here:
            raise CheckpointError(
                f"{path}: {key} is {there[0]} {there[1]} in the file and {here[0]} {here[1]} in the"
                " model."
            )
    with torch.no_grad():
        for key, tensor in tensors.items():
            state[key].copy_(tensor)
    after = _tensors(model)
    if unset := [key for key, tensor in tensors.items() if not _same(after[key], tensor)]:
        raise CheckpointError(
            f"{path}: {_some(unset)} cannot be set: the model's state_dict() gives copies of it."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().cpu().nan_to_num(), b.nan_to_num())
