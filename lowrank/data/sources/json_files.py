"""JSON as people have it: an array, `{"data": [...]}`, objects one after another, one object per line.

Arrays are read piece by piece, so their size does not matter; what is broken is reported with line and column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lowrank.data.formats.columns import RowProblem
from lowrank.data.sources.encodings import Note, open_text
from lowrank.data.sources.places import shown
from lowrank.errors import DataError

_CHUNK = 1 << 20
LARGEST_ROW = 64 << 20
"""Characters of one row at most; beyond this the file is broken rather than the row long."""
_LARGEST_DOCUMENT = 256 << 20
"""Characters of a file that is one JSON value."""
_DEEPEST = 100
"""Lists and objects within one another; nobody's data has so many, and much would break on them."""
_WRAPPER = re.compile(r'\s*\{\s*"data"\s*:\s*(?=\[)')
_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()

Item = tuple[int, Any]
"""Number of the row (in files of lines: the line), and its value or the RowProblem that took its place."""


def read_json(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """The rows of a .json or .jsonl file, whichever of the forms it really has.

    Raises DataError for broken JSON with file, line and column; in a file of lines only that line is a RowProblem.
    """
    with open_text(path, note, streaming=streaming) as file:
        head = file.read(_CHUNK).lstrip()
        file.seek(0)
        wrapper = _WRAPPER.match(head)
        if head.startswith("[") or wrapper:
            yield from _array(file, path, skip=wrapper is not None)
        elif path.suffix.lower() in (".jsonl", ".ndjson") or _has_lines(file):
            yield from _lines(file, path)
        else:
            yield from _document(file, path)


def _has_lines(file: TextIO) -> bool:
    """Whether the first two lines with something on them are whole JSON values."""
    lines = iter(partial(file.readline, LARGEST_ROW), "")
    first = list(islice((line for line in lines if line.strip()), 2))
    file.seek(0)
    try:
        return len(first) == 2 and all(json.loads(line) is not None for line in first)
    except (ValueError, RecursionError):
        return False


def numbered_lines(file: TextIO, path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file, counted from 1. DataError for one that is longer than any row."""
    number = 0
    while line := file.readline(LARGEST_ROW):
        number += 1
        if len(line) == LARGEST_ROW and not line.endswith("\n"):
            raise DataError(
                f"{shown(path)}: line {number} has more than {LARGEST_ROW:,} characters, no row is so long; "
                "put line breaks between the rows"
            )
        yield number, line


def _lines(file: TextIO, path: Path) -> Iterator[Item]:
    for number, line in numbered_lines(file, path):
        if not line.strip():
            continue
        try:
            yield number, _shallow(json.loads(line.rstrip()), line)
        except json.JSONDecodeError as error:
            yield number, RowProblem(f"broken JSON: column {error.colno}: {error.msg}; {_way_out(error)}")
        except (ValueError, RecursionError) as error:
            yield number, RowProblem(_unreadable(error))


def _unreadable(error: ValueError | RecursionError) -> str:
    """Why well-formed JSON cannot be read."""
    if isinstance(error, RecursionError):
        return f"nested too deeply: more than {_DEEPEST} lists and objects within one another"
    return f"broken JSON: {str(error).split(';')[0]}"


def _shallow(value: Any, text: str) -> Any:
    """`value`, parsed from `text`; RecursionError if it is nested too deeply."""
    if text.count("[") + text.count("{") > _DEEPEST:
        level = [value]
        for _ in range(_DEEPEST):
            level = [item for each in level for item in _inside(each) if isinstance(item, (dict, list))]
        if level:
            raise RecursionError
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _document(file: TextIO, path: Path) -> Iterator[Item]:
    text = file.read(_LARGEST_DOCUMENT)
    if not text.strip():
        raise DataError(f"{shown(path)} is empty: it has nothing but blanks")
    if len(text) == _LARGEST_DOCUMENT:
        raise DataError(f"{shown(path)}: one JSON value of more than {len(text):,} characters; write one row per line")
    try:
        value = _shallow(json.loads(text), text)
    except json.JSONDecodeError as error:
        raise _broken(path, error, error.lineno, error.colno) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown(path)}: {_unreadable(error)}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from enumerate(value["data"], start=1)
    elif isinstance(value, dict) and not (len(value) > 1 and all(isinstance(item, list) for item in value.values())):
        yield 1, value
    else:
        raise DataError(
            f"{path}: expected a list of objects, one per row, got "
            f"{'an object of columns' if isinstance(value, dict) else type(value).__name__}"
        )


def _array(file: TextIO, path: Path, skip: bool) -> Iterator[Item]:
    """Items of the array at the beginning of `file`, or with `skip` after the first `[`."""
    text = _Text(file, path)
    text.enter()
    number = 0
    while not text.at("]"):
        if number:
            text.expect_comma()
        number += 1
        yield number, text.item()
    if not skip:
        text.expect_end()


class _Text:
    """A window on a file that slides forward over JSON values and knows its line and column."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._place = "", 0
        self._lines, self._column = 0, 0  # what was before the window: lines ended, and characters of the last line

    def enter(self) -> None:
        """Go behind the first `[`."""
        self._more(_CHUNK)
        self._place = self._text.index("[") + 1

    def at(self, mark: str) -> bool:
        """Whether `mark` comes next, after white space."""
        self._skip_blank()
        return self._text.startswith(mark, self._place)

    def expect_comma(self) -> None:
        """Go behind a comma that something follows."""
        if not self.at(","):
            raise self._error("Expecting ',' delimiter")
        comma = self._place
        self._place += 1
        if self.at("]"):
            self._place = comma
            raise self._error("Trailing comma")

    def expect_end(self) -> None:
        """Nothing but white space may follow."""
        self._place += 1
        self._skip_blank()
        if self._place < len(self._text):
            raise self._error("Extra data")

    def item(self) -> Any:
        """The JSON value that comes next; more of the file is read until it is whole."""
        self._skip_blank()
        while True:
            try:
                begun = self._place
                value, self._place = _DECODER.raw_decode(self._text, begun)
                return _shallow(value, self._text[begun : self._place])
            except json.JSONDecodeError as error:
                waiting = len(self._text) - self._place
                if waiting > LARGEST_ROW or not self._more(max(_CHUNK, waiting)):
                    self._place = error.pos
                    raise self._error(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._error(_unreadable(error)) from error

    def _skip_blank(self) -> None:
        while True:
            found = _BLANK.match(self._text, self._place)
            assert found is not None
            self._place = found.end()
            if self._place < len(self._text) or not self._more(_CHUNK):
                return

    def _more(self, size: int) -> bool:
        """Let go of what was read and read on; False at the end of the file."""
        fresh = self._file.read(size)
        if fresh:
            gone = self._text[: self._place]
            self._lines, self._column = self._position(gone)
            self._text, self._place = self._text[self._place :] + fresh, 0
        return bool(fresh)

    def _position(self, gone: str) -> tuple[int, int]:
        ended = gone.count("\n")
        column = len(gone) - gone.rfind("\n") - 1 if ended else self._column + len(gone)
        return self._lines + ended, column

    def _error(self, message: str) -> DataError:
        lines, column = self._position(self._text[: self._place])
        error = json.JSONDecodeError(message, self._text, self._place)
        return _broken(self._path, error, lines + 1, column + 1)


def _broken(path: Path, error: json.JSONDecodeError, line: int, column: int) -> DataError:
    return DataError(f"{shown(path)}: broken JSON in line {line}, column {column}: {error.msg}\n  {_way_out(error)}")


def _way_out(error: json.JSONDecodeError) -> str:
    """What most likely happened, and what to do."""
    here = error.doc[error.pos : error.pos + 1]
    if error.msg == "Trailing comma" or (error.msg.startswith(("Expecting", "Illegal")) and here in ("}", "]")):
        return "remove the comma before the closing bracket"
    if here == "'":
        return "JSON wants double quotes"
    if here == "\0":
        return "a zero byte stands inside a text, as in files cut off by a crash; remove it"
    if error.msg.startswith("Invalid control"):
        return "a line break or tab stands inside a text; write \\n or \\t"
    if error.msg.startswith("Invalid \\"):
        return "a single backslash stands inside a text; write two"
    if error.doc[error.pos :].lstrip()[:4] in ("None", "True") or error.doc[error.pos :].startswith("False"):
        return "JSON writes null, true and false"
    if not here or error.msg.startswith("Unterminated"):
        return "it ends too early: was it cut off while copying, or is a closing quotation mark or bracket missing?"
    if error.msg.startswith("Expecting ',' delimiter"):
        return 'a comma is missing before it, or a quotation mark inside a text is not written \\"'
    if error.msg == "Extra data":
        return "objects that follow one another need commas between them and [ ] around all, or one line each"
    return "mend it there, or write the file again with a JSON library"
