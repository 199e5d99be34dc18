"""Rows out of one file, by its kind: json, jsonl, csv, parquet, arrow, txt; what a file is, its content says."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from lowrank.data.formats.columns import RowProblem
from lowrank.data.sources.csv_dialect import SAMPLE, dialect_of
from lowrank.data.sources.encodings import Note, open_text
from lowrank.data.sources.file_kinds import HEAD, packed_as, suffix_by_content
from lowrank.data.sources.json_files import LARGEST_ROW, Item, numbered_lines, read_json
from lowrank.data.sources.places import shown
from lowrank.data.sources.spooled import PACKED_ENDS, unpacked
from lowrank.errors import DataError

Reader = Callable[[Path, Note, bool], Iterator[Item]]
"""`(path, note, streaming)` to numbered rows. No reader holds more of a file than it must."""

_ROWS_AT_ONCE = 1000


def read_txt(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """`{"text": line}` for every line that is not blank; numbers are line numbers."""
    with open_text(path, note, streaming=streaming) as file:
        for number, line in numbered_lines(file, path):
            if line.strip():
                yield number, {"text": line.rstrip("\n")}


def read_csv(path: Path, note: Note, streaming: bool) -> Iterator[Item]:
    """Rows under the header line, every cell a text; the first row is 1."""
    # The csv module keeps one limit for the whole process; 131072 characters are too few for documents.
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_ROW))
    with open_text(path, note, streaming=streaming, newline="") as file:
        sample = file.read(SAMPLE)
        dialect = dialect_of(sample, len(sample) < SAMPLE, "\t" if path.suffix.lower() == ".tsv" else ",")
        if dialect.mark != ("\t" if path.suffix.lower() == ".tsv" else ","):
            note(f"{path.name} is read with {dialect.mark!r} between its cells")
        file.seek(0)
        file.read(dialect.skipped)
        lines = csv.reader(file, delimiter=dialect.mark, strict=True)
        try:
            yield from _under_header(lines, path)
        except csv.Error as error:
            raise DataError(
                f"{shown(path)}: broken CSV in line {lines.line_num}: {error}\n  a quotation mark inside a cell is "
                'written twice (""), and such a cell is quoted as a whole'
            ) from error


def _under_header(lines: Iterable[list[str]], path: Path) -> Iterator[Item]:
    cells = iter(lines)
    names = next(cells, [])
    while names and not names[-1].strip():
        names.pop()  # marks at the end of the line, as spreadsheets write them
    if not any(names):
        raise DataError(f"{path} is empty: expected a header line with the names of the columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: its header names {', '.join(map(repr, twice))} twice; give every column its own name")
    number = 0
    for row in cells:
        if not row:
            continue  # a blank line
        while len(row) > len(names) and not row[-1].strip():
            row.pop()
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
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{shown(path)}: broken parquet file ({_first_line(error)}); was it written to its end?"
        ) from error


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
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{shown(path)}: broken Arrow file ({_first_line(error)}); was it written to its end?"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:200]


def _numbered(batches: Iterable[pa.RecordBatch]) -> Iterator[Item]:
    parts = (batch.slice(start, _ROWS_AT_ONCE) for batch in batches for start in range(0, len(batch), _ROWS_AT_ONCE))
    rows = (row for part in parts for row in part.to_pylist())
    yield from enumerate(({key: without_filled(value) for key, value in row.items()} for row in rows), start=1)


def without_filled(value: Any) -> Any:
    """A value out of Arrow without the nulls in its structs.

    Arrow has one struct for all rows, so a key that one row has is null in every other: it is none of theirs. What
    was a null from the beginning cannot be told from it. Items of lists stay as they are; so do nulls in JSON texts.
    """
    if isinstance(value, dict):
        return {key: without_filled(item) for key, item in value.items() if item is not None}
    return [without_filled(item) for item in value] if isinstance(value, list) else value


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

_FLEXIBLE = {".json": ".jsonl", ".ndjson": ".jsonl", ".tsv": ".csv"}
"""Kinds that one reader tells apart itself."""


def is_data(path: Path) -> bool:
    """Whether a file's name is that of one with rows, compressed or not."""
    name = path.name.lower()
    inner = next((name[: -len(end)] for end in PACKED_ENDS if name.endswith(end)), name)
    return Path(inner).suffix in READERS or (name.endswith(".zip") and Path(inner).suffix == "")


def read_file(path: Path, note: Note, streaming: bool, plain_text: bool = False) -> Iterator[Item]:
    """The rows of a file of any kind, by its content first, then by its name. DataError says what else it is.

    `plain_text`: the lines of a .txt file are wanted as they stand, whatever they look like.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    packed = packed_as(head)
    content = "" if plain_text and path.suffix.lower() == ".txt" and head else suffix_by_content(path, head)
    if packed:
        yield from read_file(unpacked(path, packed), note, streaming, plain_text)
        return
    named = path.suffix.lower()
    suffix = content if _contradicts(named, content) else named
    if suffix not in READERS:
        raise DataError(
            f"{shown(path)}: files ending in {named or 'nothing'!r} cannot be read, those ending in "
            f"{', '.join(READERS)} can, also compressed (gz, bz2, xz, zip)"
        )
    if suffix != named:
        note(f"{path.name} is read as {suffix[1:]}, which it is by its content")
    yield from READERS[suffix](path, note, streaming)


def _contradicts(named: str, content: str) -> bool:
    """Whether a file's content is of another kind than its name says."""
    if not content or content == _FLEXIBLE.get(named, named):
        return False
    # A table without a name that says so is believed only where no name contradicts it: plain text may begin like one.
    return content != ".csv" or named not in (".txt", ".jsonl")
