"""Turns a block graph into the Python text of its forward, which can be compiled and pickled."""

import hashlib
import importlib
import keyword
import linecache
import re
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

# For each entry of linecache, how many living functions have that text.
_shown: Counter[str] = Counter()


def _forget(filename: str) -> None:
    """Remove an entry of linecache when the last of its functions is gone."""
    _shown[filename] -= 1
    if not _shown[filename]:
        del _shown[filename]
        linecache.cache.pop(filename, None)


@dataclass(frozen=True, eq=False)
class ForwardSource:
    """The forward of a graph as text, with the functions and modules that it names."""

    text: str
    names: dict[str, Any]
    label: str  # a name for tracebacks, such as "SEBottleneck.forward"

    @classmethod
    def of(cls, graph: fx.Graph, label: str) -> "ForwardSource":
        code = graph.python_code("self")
        text = code.src
        targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
        for target in sorted(targets, key=len, reverse=True):
            text = _without_keywords(text, target)
        return cls(text, dict(code.globals), label)

    def compile(self, *, show: bool = True) -> Callable[..., Any]:
        """The function. With ``show``, tracebacks and ``inspect.getsource`` have its text."""
        # The file is named after the text, so that equal forwards share one entry of linecache.
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:12]
        filename = f"<se_inject {digest} {self.label}>"
        namespace = dict(self.names)
        exec(compile(self.text, filename, "exec", dont_inherit=True), namespace)
        function: Callable[..., Any] = namespace["forward"]
        if show:
            _shown[filename] += 1
            lines = self.text.splitlines(True)
            linecache.cache[filename] = (len(self.text), None, lines, filename)
            weakref.finalize(function, _forget, filename).atexit = False
        return function

    def __reduce__(self) -> tuple[Any, ...]:
        used = _names_in(compile(self.text, self.label, "exec", dont_inherit=True))
        names = {k: _portable(v) for k, v in self.names.items() if k in used}
        return _forward_source, (self.text, names, self.label)


def _without_keywords(text: str, target: str) -> str:
    """The text, with ``self.branches.if``, which fx writes, in a form that Python can read."""
    parts = target.split(".")
    if not any(map(keyword.iskeyword, parts)):
        return text
    written = read = "self"
    for part in parts:
        by_name = f'"{part}")'
        dotted = part.isidentifier()
        written = f"{written}.{part}" if dotted else f"getattr({written}, {by_name}"
        dotted = dotted and not keyword.iskeyword(part)
        read = f"{read}.{part}" if dotted else f"getattr({read}, {by_name}"
    return re.sub(rf"{re.escape(written)}(?![\w.])", lambda _: read, text)


def _names_in(code: types.CodeType) -> set[str]:
    """The names in the text and in its functions. Defaults are evaluated outside the function."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _forward_source(text: str, names: dict[str, Any], label: str) -> ForwardSource:
    return ForwardSource(text, {k: _restored(v) for k, v in names.items()}, label)


@dataclass(frozen=True)
class _Module:
    """Stands for an imported module, which pickle cannot carry."""

    name: str


def _portable(value: Any) -> Any:
    return _Module(value.__name__) if isinstance(value, types.ModuleType) else value


def _restored(value: Any) -> Any:
    return importlib.import_module(value.name) if isinstance(value, _Module) else value
