"""What a file of ``save_se`` says besides its tensors."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from se_inject.edit.block_class import Edit, edit_of
from se_inject.graph.recording.call import Arguments
from se_inject.keep.fingerprint import dtype_name, hash_of, tensors_of
from se_inject.layers.gates import Init
from se_inject.layers.identity_start import IdentityStart
from se_inject.layers.squeeze_excite import SqueezeExcite
from se_inject.layers.variant import Variant
from se_inject.sites.scaled import Where

# The newest format that this version writes. Files of format 1 name no squeeze, gate and bias:
# their blocks are the standard ones, which are the defaults. Files of formats 1 and 2 know residual
# branches only. In formats 1 to 3, the layers of a user's se_layer are never in an IdentityStart,
# whatever their init says. In format 4 the init says whether they are, and SE blocks may have a
# shift. A file that needs nothing of format 4 is written in format 3, which older versions read.
FORMAT = 4
_PLAIN_FORMAT = 3

# This entry of the safetensors header holds our own header, as JSON.
HEADER_KEY = "se_inject"


@dataclass(frozen=True)
class SharedSettings:
    """The settings that all SE blocks of one ``inject_se`` call share."""

    variant: Variant
    custom: bool  # whether a user's se_layer made the blocks
    example: int  # the forward was recorded with the example of this index in the header
    where: Where = "residual"  # where the plan looked for sites


@dataclass(frozen=True)
class SavedSite:
    """One SE block of the saved model."""

    block: str
    child: str
    r: int
    channels: int | None  # None if a user's se_layer made the block, which need not say this
    bottleneck: int | None  # None in the same case
    settings: SharedSettings

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-ready data. The options of the variant are among the settings."""
        data = asdict(self)
        del data["settings"]["variant"]
        data["settings"] |= self.settings.variant.to_dict()
        return data


@dataclass(frozen=True)
class Header:
    """Everything that a file of :func:`save_se` says besides its tensors."""

    version: str  # the version of se_inject that wrote the file
    model: str  # the class of the saved model
    sites: tuple[SavedSite, ...]
    # Each example has the form that example_input takes. It is None if JSON could not hold it.
    examples: tuple[Any, ...]
    modules: Mapping[str, str]  # name -> hash of the module's class and repr (such as its eps)
    base: Mapping[str, Sequence[Any]]  # name -> dtype, shape, and a hash or None

    @property
    def frozen(self) -> list[str]:
        """The names of the tensors that are not in the file and that the base must bring."""
        return [key for key, (*_, digest) in self.base.items() if digest]

    def differing(self, base: nn.Module) -> list[str]:
        """The names of the frozen tensors that ``base`` lacks or has with other values."""
        state = tensors_of(base)
        return [
            key
            for key in self.frozen
            if key not in state or state[key].is_meta or hash_of(state[key]) != self.base[key][2]
        ]

    def groups(self) -> dict[SharedSettings, list[SavedSite]]:
        """The sites, grouped by the ``inject_se`` call that made them."""
        return by_call(self.sites)


def by_call(sites: Iterable[SavedSite]) -> dict[SharedSettings, list[SavedSite]]:
    """Group sites by the ``inject_se`` call that made them."""
    groups: dict[SharedSettings, list[SavedSite]] = {}
    for site in sites:
        groups.setdefault(site.settings, []).append(site)
    return groups


def saved_sites(model: nn.Module, examples: list[Any]) -> list[SavedSite]:
    """The SE blocks of a model. A block that has two names comes only once.

    The arguments with which the forwards were recorded are appended to ``examples``.
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
            # The layer knows its init best, because folding the gate changes it. For a layer of the
            # user's own, only the placement comes from our options.
            variant=replace(settings.variant, init=layer.init)
            if ours
            else Variant(settings.variant.placement, init=_init_of(layer)),
            custom=not ours,
            example=examples.index(example),
            where=settings.where,
        ),
    )


def _init_of(layer: nn.Module) -> Init:
    """How a layer that is not an SE block began."""
    return "identity" if isinstance(layer, IdentityStart) else "paper"


def format_of(sites: Iterable[SavedSite]) -> int:
    """The oldest format in which these sites can be described."""
    of_all = {(site.settings.custom, site.settings.variant) for site in sites}
    newer = any(of.shift or (custom and of.init == "identity") for custom, of in of_all)
    return FORMAT if newer else _PLAIN_FORMAT


def _encode_example(example: Arguments) -> Any:
    """An example as JSON-ready data, in the form that ``example_input`` takes.

    None stands for an example that JSON cannot hold. ``load_se`` then asks for an example_input.
    """
    args, kwargs = example
    try:
        return _encode(kwargs or args)
    except TypeError:
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
