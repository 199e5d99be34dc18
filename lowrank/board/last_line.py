"""The end of a file that may be large and may be written to just now."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOST = 4 << 20
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\x00-\x08\x0b-\x1f\x7f]")
BAR = re.compile(
    r"(?P<label>.*?)\s*[━╸╺─=>\-]{6,}\s+(?:(?P<done>\d+)/(?P<all>\d+)|(?P<percent>\d+)%)\s+(?P<left>[-\d:]+)\s*"
)
"""A progress bar as commands draw it where they take their standard error for a terminal."""


def last_lines(path: Path, number: int) -> list[str]:
    """The last whole or unfinished lines with something in them; nothing if there is no file.

    At most 4.2 MB from the end are read. What is no UTF-8 is replaced.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            read, piece = b"", 1 << 16
            while len(read) < size and len(read) < _MOST and read.count(b"\n") <= number:
                start = max(0, size - len(read) - piece)
                file.seek(start)
                read = file.read(size - len(read) - start) + read
                piece *= 2
    except OSError:
        return []
    lines = [line for line in read.decode("utf-8", errors="replace").split("\n") if line.strip()]
    return lines[-number:]


def message_lines(path: Path, number: int) -> list[str]:
    """The last lines of what a command said to a person: without what moves a cursor, of a progress bar the last."""
    found: list[str] = []
    for line in last_lines(path, 40 * number):
        text = _CONTROL.sub("", line.rpartition("\r")[2]).strip()
        if not text:
            continue
        bar = BAR.fullmatch(text)
        if bar is not None:
            found = [each for each in found if (other := BAR.fullmatch(each)) is None or other["label"] != bar["label"]]
        found.append(text)
    return found[-number:]
