"""Rows out of one file, by its kind: json, jsonl, csv, parquet, arrow, txt."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from lowrank.data.columns import RowProblem
from lowrank.data.encodings import Note, open_text
from lowrank.data.json_files import Item, read_json
from lowrank.errors import DataError

Reader = Callable[[Path, Note, bool], Iterator[Item]]
"""`(path, note, streaming)` to numbered rows. No reader holds more of a file than it must."""

_ROWS_AT_ONCE = 1000
_LONGEST_CELL = 1 << 30


def read_txt(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """`{"text": line}` for every line that is not blank; numbers are line numbers."""
    with open_text(path, note, streaming=streaming) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def read_csv(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """Rows under the header line, every cell a text; the first row is 1."""
    # The csv module keeps one limit for the whole process; 131072 characters are too few for documents.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with open_text(path, note, streaming=streaming, newline="") as file:
        delimiter = _delimiter(file.readline(), path, note)
        file.seek(0)
        lines = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            yield from _under_header(lines, path)
        except csv.Error as error:
            raise DataError(
                f"{path}: broken CSV in line {lines.line_num}: {error}\n  a quotation mark inside a cell is written "
                'twice (""), and such a cell is quoted as a whole'
            ) from error


def _delimiter(header: str, path: Path, note: Note) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    found = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    if found != ",":
        note(f"{path.name} is read with {found!r} between its cells")
    return found


def _under_header(lines: Iterable[list[str]], path: Path) -> Iterator[Item]:
    cells = iter(lines)
    names = next(cells, [])
    if not any(names):
        raise DataError(f"{path} is empty: expected a header line with the names of the columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: its header names {', '.join(map(repr, twice))} twice; give every column its own name")
    number = 0
    for row in cells:
        if not row:
            continue  # a blank line
        number += 1
        if len(row) == len(names):
            yield number, dict(zip(names, row))
        else:
            yield number, RowProblem(f"wrong number of cells: {len(row)}, while the header has {len(names)}")


def read_parquet(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """Rows of a parquet file, read a thousand at a time."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from _numbered(file.iter_batches(batch_size=_ROWS_AT_ONCE))
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from error


def read_arrow(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """Rows of an Arrow file or stream (what `datasets` saves), mapped into memory, not copied."""
    try:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
                batches: Iterable[pa.RecordBatch] = (file.get_batch(n) for n in range(file.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
            yield from _numbered(batches)
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as an Arrow file: {error}") from error


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Item]:
    parts = (batch.slice(start, _ROWS_AT_ONCE) for batch in batches for start in range(0, len(batch), _ROWS_AT_ONCE))
    yield from enumerate((row for part in parts for row in part.to_pylist()), start=1)


READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
"""By the end of a file's name."""
