"""Which encoding a text file is in, found out before anything is parsed."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from lowrank.errors import DataError

CHUNK_BYTES = 1 << 20
SNIFFED_BYTES = 16 << 20
"""How much of a streamed file is looked at; other files are looked at whole."""
_ENOUGH_UTF8 = 10
"""So many characters beyond ASCII do not become valid UTF-8 by chance: such a file is UTF-8 with a broken byte."""
_ZERO_BYTES = 20
"""One byte of so many being zero is no accident."""
_BOMS = (  # the longer marks first: the UTF-32 mark begins with the UTF-16 one
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

Note = Callable[[str], None]
"""Receives what a person should know about the data but need not mend."""


def open_text(path: Path, note: Note, *, streaming: bool = False, newline: str | None = None) -> TextIO:
    """The file as text: UTF-8 (with or without BOM), UTF-16 or UTF-32 by BOM, or Chinese in GB18030.

    Raises DataError with the byte offset if it is none of these. `newline` is `open`'s.
    """
    encoding = detect(path, limit=SNIFFED_BYTES if streaming else None)
    if not encoding.startswith("utf-8"):
        note(f"{path.name} is read as {encoding.upper()}; saved as UTF-8 it is readable everywhere")
    return path.open(encoding=encoding, newline=newline)


def detect(path: Path, limit: int | None = None) -> str:
    """The encoding of the first `limit` bytes (None: of the whole file), as Python names it."""
    with path.open("rb") as file:
        head = file.read(4096)
        for mark, encoding in _BOMS:
            if head.startswith(mark):
                return encoding
        _check_zero_bytes(path, head)
        offset, characters = _valid_utf8(file, limit)
        if offset is None:
            return "utf-8"
        if characters < _ENOUGH_UTF8 and _is_chinese(file, limit):
            return "gb18030"
    if characters >= _ENOUGH_UTF8:
        raise DataError(
            f"{path}: broken UTF-8: the byte at offset {offset} belongs to no character; mend it there, or drop such "
            "bytes with `iconv -c -f UTF-8 -t UTF-8`"
        )
    raise DataError(
        f"{path}: neither UTF-8 (invalid at byte offset {offset}) nor GB18030 nor marked as UTF-16; "
        "save it as UTF-8, e.g. `iconv -f LATIN1 -t UTF-8`"
    )


def _check_zero_bytes(path: Path, head: bytes) -> None:
    """DataError for what is no text in single bytes. A few zero bytes are left to the rows they stand in."""
    if head.count(0) * _ZERO_BYTES < len(head):
        return
    even, odd = head[::2].count(0), head[1::2].count(0)
    if min(even, odd) * 4 < max(even, odd):
        name = "UTF-16LE" if odd > even else "UTF-16BE"
        raise DataError(
            f"{path}: zero bytes in its beginning: UTF-16 without a byte order mark; save it as UTF-8, "
            f"`iconv -f {name} -t UTF-8`"
        )
    raise DataError(f"{path}: zero bytes in its beginning: a binary file, no text; save its rows as JSON lines or CSV")


def _chunks(file: BinaryIO, limit: int | None) -> Iterator[bytes]:
    file.seek(0)
    left = limit
    while chunk := file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
        yield chunk
        left = None if left is None else left - len(chunk)


def _valid_utf8(file: BinaryIO, limit: int | None) -> tuple[int | None, int]:
    """Byte offset of the first byte that is not UTF-8 (None: all are), and the characters beyond ASCII before it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = characters = 0
    for chunk in _chunks(file, limit):
        pending = len(decoder.getstate()[0])
        try:
            characters += _beyond_ascii(decoder.decode(chunk))
        except UnicodeDecodeError as error:
            return read - pending + error.start, characters + _beyond_ascii(error.object[: error.start].decode())
        read += len(chunk)
    pending = len(decoder.getstate()[0])
    return (read - pending if pending and not _cut_by_us(read, limit) else None), characters


def _cut_by_us(read: int, limit: int | None) -> bool:
    """Whether a character at the end may be incomplete because no more of the file was read."""
    return limit is not None and read >= limit


def _beyond_ascii(text: str) -> int:
    return 0 if text.isascii() else len(text) - len(text.encode("ascii", "ignore"))


def _is_chinese(file: BinaryIO, limit: int | None) -> bool:
    """Whether the bytes are GB18030 and mostly common Chinese characters.

    Western 8-bit text often happens to be valid GB18030 as well, but then its characters are rare ones:
    those of GB2312 need two high bytes in a row.
    """
    decoder = codecs.getincrementaldecoder("gb18030")()
    foreign = common = read = 0
    for chunk in _chunks(file, limit):
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError:
            return False
        read += len(chunk)
        foreign += _beyond_ascii(text)
        common += (len(text.encode("gb2312", "ignore")) - len(text.encode("ascii", "ignore"))) // 2
    whole = not decoder.getstate()[0] or _cut_by_us(read, limit)
    return whole and common >= 0.9 * foreign > 0
