"""Text from files, models and people, made safe for a terminal: no control or direction code of theirs reaches it.

Whatever is printed through `Console` or, within `safe_streams`, through `print` and `typer.echo` is made safe here and
nowhere else. A terminal that lacks a character (ASCII, GBK) gets its number instead of a traceback.
"""

from __future__ import annotations

import io
import re
import sys
import unicodedata
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.segment import Segment

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""They show a text in another order than it has."""
_UNSAFE = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_DIRECTIONS}]")
_UNSAFE_OR_COLOR = re.compile(rf"(\x1b\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff{_DIRECTIONS}]")
"""Half a character (a lone surrogate) can be written nowhere. In a stream, colors (typer's) and carriage returns
(progress bars) pass."""


def printable(text: str) -> str:
    """Without control characters but line breaks and tabs: what a model says must not steer the terminal."""
    return "".join(
        sign for sign in text if sign in "\n\t" or (unicodedata.category(sign) != "Cc" and sign not in _DIRECTIONS)
    )


def visible(text: str) -> str:
    """The same with every such character written as `\\u001b`, so that nothing of a name or value is hidden."""
    return _UNSAFE.sub(_written_out, text)


def _written_out(match: re.Match[str]) -> str:
    color = match[1] if match.re.groups else None
    return color or f"\\u{ord(match[0]):04x}"


class Console(rich.console.Console):
    """rich's, whose texts are made visible as they are drawn; its own colors and movements stay."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        """All that is written passes here, also of tables, panels and progress bars."""
        return super()._render_buffer(
            segment if segment.control else Segment(visible(segment.text), segment.style) for segment in buffer
        )


class _SafeStream:
    """A text stream for `print`; rich, which draws with codes of its own, writes past it."""

    def __init__(self, raw: Any) -> None:
        self.rich_proxied_file = raw

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(_UNSAFE_OR_COLOR.sub(_written_out, text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def safe_streams() -> Generator[None, None, None]:
    """stdout and stderr that take any text, and let no control codes through."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (_SafeStream(stream) if stream is not None else stream for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
