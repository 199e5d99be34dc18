"""Ollama's Modelfile: a model, or a base and an adapter, with what a server must know to run it.

    FROM ./mine-Q8_0.gguf
    PARAMETER num_ctx 1024
    PARAMETER stop "<|im_end|>"

Values stand bare to the end of the line, in `"..."`, or in triple quotes; nothing can be escaped, and a value ends at
the first line that ends in its closing quotes. Ollama drops characters that cannot be printed (docs/modelfile and its
parser, as of 0.33). No TEMPLATE is the better one since Ollama 0.30: the chat template in the GGUF file is then used.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from lowrank.errors import ModelError

_TEXTS = ("from", "adapter", "template", "system", "license")
_NOT_OURS = ("message", "renderer", "parser", "requires", "draft")
_WHOLE = ("num_ctx", "num_predict", "num_keep", "seed", "top_k", "repeat_last_n", "num_gpu", "num_thread", "num_batch")


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile says."""

    model: str
    """FROM: a file beside it (`./mine.gguf`), or the name of a model that the server has."""
    adapter: str | None = None
    template: str | None = None
    """A template in Go's language, for servers older than 0.30."""
    system: str | None = None
    license: str | None = None
    parameters: tuple[tuple[str, str | int | float], ...] = ()
    """In order; `stop` may stand several times."""
    projector: str | None = None
    """A second FROM: the file of the model's tower, which Ollama calls its projector."""

    def text(self) -> str:
        """The file. Raises ModelError for a value that the format cannot hold."""
        lines = [f"FROM {_quoted('FROM', self.model)}"]
        if self.projector is not None:
            lines.append(f"FROM {_quoted('FROM', self.projector)}")
        if self.adapter is not None:
            lines.append(f"ADAPTER {_quoted('ADAPTER', self.adapter)}")
        lines += [f"PARAMETER {name} {_quoted(f'PARAMETER {name}', value)}" for name, value in self.parameters]
        for keyword in ("template", "system", "license"):
            value = getattr(self, keyword)
            if value is not None:
                lines.append(f"{keyword.upper()} {_quoted(keyword.upper(), value, triple=True)}")
        return "\n".join(lines) + "\n"

    def request_parameters(self) -> dict[str, Any]:
        """As POST /api/create takes them: `stop` is a list."""
        found: dict[str, Any] = {}
        for name, value in self.parameters:
            if name == "stop":
                found.setdefault(name, []).append(str(value))
            else:
                found[name] = value
        return found


def printable(text: str) -> str:
    """What Ollama keeps of a text that stands in a Modelfile: letters, marks, numbers, signs, and plain white space."""
    return "".join(char for char in text if char in " \t\r\n" or unicodedata.category(char)[0] in "LMNPS")


def _quoted(what: str, value: str | int | float, *, triple: bool = False) -> str:
    if not isinstance(value, str):
        return str(value)
    lost = sorted({char for char in value if char not in printable(char)})
    if lost:
        names = ", ".join(f"U+{ord(char):04X}" for char in lost[:5])
        raise ModelError(f"Modelfile: {what} has characters that Ollama drops ({names}); take them out")
    if '"""' in value:
        raise ModelError(f'Modelfile: {what} contains """, which its format cannot hold')
    if triple or '"' in value or "\n" in value or "\r" in value:
        return f'"""{value}"""'
    bare = re.fullmatch(r"[\w./:<|-][\w./:<>|-]*", value)
    return value if bare and what in ("FROM", "ADAPTER") else f'"{value}"'


def parse(text: str) -> Modelfile:
    """Read a Modelfile, ours or one that a person has changed. Raises ModelError with the line."""
    directives: dict[str, str] = {}
    parameters: list[tuple[str, str | int | float]] = []
    lines = text.removeprefix("\ufeff").splitlines(keepends=True)
    at = 0
    while at < len(lines):
        first, line = at, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        keyword, _, rest = line.partition(" ")
        keyword, rest = keyword.lower(), lines[first].lstrip()[len(keyword) :].lstrip(" \t")
        name = ""
        if keyword == "parameter":
            name, _, value = rest.partition(" ")
            rest = value.lstrip(" \t")
        elif keyword in _NOT_OURS:
            raise ModelError(
                f"Modelfile, line {first + 1}: {keyword.upper()} is not deployed by lowrank; use ollama create"
            )
        elif keyword not in _TEXTS:
            raise ModelError(f"Modelfile, line {first + 1}: {keyword!r} is no instruction of a Modelfile")
        while (value := _unquoted(rest)) is None:
            if at == len(lines):
                raise ModelError(f"Modelfile, line {first + 1}: the quotes of {keyword.upper()} are never closed")
            rest += lines[at]
            at += 1
        if keyword == "parameter":
            parameters.append((name, _number(name, value, first + 1)))
        else:
            if keyword == "from":
                keyword = "projector" if "model" in directives else "model"
                if keyword in directives:
                    raise ModelError(f"Modelfile, line {first + 1}: a third FROM; lowrank knows a model and its tower")
            directives[keyword] = value
    if "model" not in directives:
        raise ModelError("Modelfile: no FROM line")
    return Modelfile(**directives, parameters=tuple(parameters))


def _unquoted(text: str) -> str | None:
    """The value; None where its quotes are still open."""
    text = text.strip()
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            closed = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if closed else None
    return text


def _number(name: str, value: str, line: int) -> str | int | float:
    if name == "stop":
        return value
    try:
        return int(value) if name in _WHOLE else float(value)
    except ValueError as error:
        raise ModelError(f"Modelfile, line {line}: PARAMETER {name} is {value!r}, expected a number") from error
