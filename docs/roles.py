"""What mkdocstrings reads as Markdown, though docstrings also have words of reStructuredText."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|data|mod):`~?([^`]+)`")
_RULE = r"=+(?: +=+)+"
_TABLE = re.compile(rf"^{_RULE}\n(?:.*\n)+?{_RULE}\n(?:.*\n)+?{_RULE}$", re.MULTILINE)
_SESSION = re.compile(r"^>>> .*\n?(?:.+\n?)*", re.MULTILINE)


class Roles(griffe.Extension):
    """Turns the roles of references into code, and tables and sessions into blocks of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            text = _TABLE.sub(lambda found: _code("text", found.group().replace("``", "  ")), text)
            text = _SESSION.sub(lambda found: _code("pycon", found.group().rstrip()) + "\n", text)
            obj.docstring.value = text


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
