"""Makes the options of commands from the fields of a dataclass, so that each is written only once.

A field that :func:`se_inject.plan.injection.option` made holds its default, its help and whatever
else Typer needs to know. A command takes the options of a whole dataclass in one parameter:

    @expand
    def report(model: str, injection: Injection) -> None: ...             # all fields, as an object
    @expand
    def export(injection: Annotated[Injection, Only("attention")]): ...   # one of them
    @expand
    def finetune(given: Annotated[Given, Settings]) -> None: ...          # what the user gave
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass
from typing import Annotated, Any

import typer

from se_inject.layers.attention import SELayer
from se_inject.names import Patterns
from se_inject.plan.injection import Ratio

_CONTEXT = "context_of_the_options"
AUTO = "auto"  # the word that stands for a number that the program is to find


@dataclass(frozen=True)
class Only:
    """The fields that a command takes as options. The other fields keep their defaults."""

    fields: tuple[str, ...]

    def __init__(self, *fields: str) -> None:
        object.__setattr__(self, "fields", fields)


class Given(dict[str, Any]):
    """The values that the user gave on the command line, by the names of their fields."""


def flag(name: str) -> str:
    """The option of a field as the user writes it: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def expand(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command in the form that Typer takes.

    Each parameter whose type is a dataclass is replaced by the options of that dataclass.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups = {name: group for name, p in own.items() if (group := _group_of(p.annotation))}
    parameters: list[inspect.Parameter] = []
    for name, parameter in own.items():
        if name in groups:
            for field, hint in groups[name].options():
                parameters += _parameters(field, hint)
        else:
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
    parameters.append(
        inspect.Parameter(
            _CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context, default=None
        )
    )

    @functools.wraps(command)
    def call(**values: Any) -> None:
        context: typer.Context = values.pop(_CONTEXT)
        for name, group in groups.items():
            values[name] = group.build(values, context)
        command(**values)

    signature = inspect.Signature(parameters)
    call.__signature__ = signature  # type: ignore[attr-defined]  # what Typer reads
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


@dataclass(frozen=True)
class _Group:
    """A parameter of a command that stands for the options of a dataclass."""

    kind: type[Any]
    only: tuple[str, ...] | None
    given: bool  # whether the command wants only the values that the user gave, not an object

    def options(self) -> Iterator[tuple["Field[Any]", Any]]:
        hints = typing.get_type_hints(self.kind)
        for field in dataclasses.fields(self.kind):
            if "help" in field.metadata and (self.only is None or field.name in self.only):
                yield field, hints[field.name]

    def build(self, values: dict[str, Any], context: typer.Context) -> Any:
        """Build the object, or the ``Given``, and take its values out of ``values``."""
        own: dict[str, Any] = {}
        for field, hint in self.options():
            value, alias = values.pop(field.name), values.pop(_alias_of(field), None)
            if not self.given or _is_given(context, field.name) or alias is not None:
                own[field.name] = _in_python(hint, value if alias is None else alias)
        return Given(own) if self.given else self.kind(**own)


def _group_of(annotation: Any) -> _Group | None:
    only: tuple[str, ...] | None = None
    if typing.get_origin(annotation) is Annotated:
        annotation, *extras = typing.get_args(annotation)
        if annotation is Given:
            return _Group(extras[0], None, given=True)
        only = next((extra.fields for extra in extras if isinstance(extra, Only)), None)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _Group(annotation, only, given=False)
    return None


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


# --- one field -----------------------------------------------------------------------------------


def _alias_of(field: "Field[Any]") -> str:
    return f"{field.name}_by_its_old_name"


def _parameters(field: "Field[Any]", hint: Any) -> Iterator[inspect.Parameter]:
    """The option of a field, and a hidden option if the field once had another name."""
    yield _parameter(field, hint)
    if "alias" in field.metadata:
        hidden = typer.Option(field.metadata["alias"], hidden=True)
        yield inspect.Parameter(
            _alias_of(field),
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[hint | None, hidden],
            default=None,
        )


def _parameter(field: "Field[Any]", hint: Any) -> inspect.Parameter:
    extra = dict(field.metadata)
    extra["rich_help_panel"] = extra.pop("panel", None)
    extra.pop("alias", None)
    can_be_auto = extra.pop("auto", False)
    default: Any = None if field.default is MISSING else field.default
    if extra.pop("argument", False):
        info: Any = typer.Argument(**extra)
        hint = hint | None if field.default is MISSING else hint
    else:
        name = flag(field.name)
        two_sided = hint is bool and default
        info = typer.Option(f"{name}/--no-{name[2:]}" if two_sided else name, **extra)
    if hint == Ratio:
        hint, default = list[str], [str(default)]
    elif hint == Patterns:
        hint = list[str] | None
    elif hint == str | SELayer | None:
        hint = str | None
    elif typing.get_origin(hint) is typing.Literal and "metavar" not in extra:
        # Typer puts no spaces between the values, so a narrow terminal breaks lines within a word.
        info = typer.Option(flag(field.name), metavar=" | ".join(typing.get_args(hint)), **extra)
    elif can_be_auto:
        for limit in ("min", "max"):
            extra.pop(limit, None)
        extra |= {"metavar": "auto|" + ("N" if hint is int else "NUMBER"), "parser": _or_auto(hint)}
        info = typer.Option(flag(field.name), **extra)
        hint, default = str, str(default)
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[hint, info],
        default=default,
    )


def _or_auto(kind: type[int] | type[float]) -> Callable[[str], Any]:
    """Make a parser that takes the word "auto" or a number."""

    def parse(text: str) -> Any:
        try:
            return text if text == AUTO else kind(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is neither a number nor {AUTO}.") from None

    return parse


def _in_python(hint: Any, value: Any) -> Any:
    """Convert a value of the command line to the type of its field."""
    if hint == Ratio:
        return parse_ratio(value)
    if hint == Patterns:
        return tuple(value) if value else None
    return value


def parse_ratio(values: Sequence[str]) -> int | dict[str, int]:
    """Convert the values of ``--r`` to the ``r`` of the API: one number, or a number for each glob.

    A number without a glob is used for all blocks that no glob matches.

    >>> parse_ratio(["16"]), parse_ratio(["layer4.*=32,layer1.*=8", "16"])
    (16, {'layer4.*': 32, 'layer1.*': 8, '*': 16})

    Raises:
        typer.BadParameter: a value is not a whole number or has an empty glob, or the same blocks
            get two numbers.
    """
    ratios: dict[str, int] = {}
    rest: list[int] = []
    for entry in (part.strip() for value in values for part in value.split(",")):
        glob, equals, number = (part.strip() for part in entry.rpartition("="))
        try:
            r = int(number)
        except ValueError:
            raise typer.BadParameter(
                f"{entry!r} is neither a whole number nor GLOB=NUMBER, such as 'layer4.*=32'.",
                param_hint="--r",
            ) from None
        if not equals:
            rest.append(r)
        elif not glob or glob in ratios:
            what = "names no blocks" if not glob else "gives a glob a second number"
            raise typer.BadParameter(f"{entry!r} {what}.", param_hint="--r")
        else:
            ratios[glob] = r
    if len(rest) > 1 or (rest and "*" in ratios):
        raise typer.BadParameter(
            f"more than one number is for all blocks: {', '.join(values)}.", param_hint="--r"
        )
    if not ratios:
        return rest[0]
    if rest:
        ratios["*"] = rest[0]  # it comes last, so that the globs before it win
    return ratios
