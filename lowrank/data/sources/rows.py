"""Where rows come from: files, folders, the packaged dataset, the hub."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from glob import iglob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.config import SourceConfig
from lowrank.data.formats.columns import RowProblem, describe
from lowrank.data.sources.encodings import Note
from lowrank.data.sources.folders import files_of
from lowrank.data.sources.hub import HUB_NAME, folder_of_files, rows_of
from lowrank.data.sources.json_files import Item
from lowrank.data.sources.memory import IN_MEMORY, rows_in_memory
from lowrank.data.sources.places import STANDARD_INPUT, TEXT_AS_ROWS, WHOLE, is_pattern, kind_at, looks_like_text, shown
from lowrank.data.sources.readers import is_data, read_file, without_filled
from lowrank.data.sources.spooled import from_pipe, naming_sources
from lowrank.errors import DataError, did_you_mean

PACKAGED = {"lowrank/demo": "train.jsonl", "lowrank/demo-heldout": "heldout.jsonl"}
"""Names of the dataset that ships with the package."""

_MOST_MATCHES = 100_000
_LONGEST_HUB_NAME = 200


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    place: str
    """Name of the file, or of the hub dataset."""
    number: int
    """Counted from 1; in jsonl and txt files it is the line."""
    values: dict[str, Any]
    problem: str | None = None
    """Why there are no values."""
    folder: Path | None = None
    """Of its file; None for rows of no file."""
    within: tuple[str, ...] = ()
    """The only folders in `folder` whose files it may name; empty: all."""


def read_rows(
    source: SourceConfig,
    *,
    seed: int,
    max_samples: int | None = None,
    streaming: bool = False,
    root: Path | None = None,
    note: Note | None = None,
) -> Iterator[Row]:
    """The rows of a dataset, in order; at most `max_samples` of them (None: `source.max_samples`).

    Which ones is decided by `seed`; with `streaming` they are the first, since the end is not known.
    `root`: where relative paths begin. `note` receives what a person should know (encodings, files left out).
    Raises DataError if there is no such dataset or it is broken as a whole.
    """
    note = note or _silence
    limit = max_samples if source.max_samples is None else source.max_samples
    split, part = _slice_of(source)
    rows = _replaced(_rows(source.model_copy(update={"split": split}), streaming, root, note), source.replace)
    if part:
        rows = _part_of(rows, part, _shown(source))
    if limit is None:
        yield from rows
    elif streaming:
        note(f"the first {limit} rows are taken (a stream has no end to choose from)")
        yield from islice(rows, limit)
    else:
        every = list(rows)
        if len(every) > limit:
            note(f"{limit} of {len(every)} rows are taken, chosen by seed {seed}")
        chosen = np.random.default_rng(seed).permutation(len(every))[:limit]
        yield from (every[index] for index in sorted(chosen.tolist()))


def _shown(source: SourceConfig) -> str:
    return "the rows in memory" if source.path.startswith(IN_MEMORY) else shown(source.path)


_SLICE = re.compile(r"(?P<split>[^\[\]]+)\[(?P<first>-?\d+%?)?:(?P<end>-?\d+%?)?\]")


def _slice_of(source: SourceConfig) -> tuple[str, tuple[str | None, str | None] | None]:
    """`(split, (first, end))` of `train[10:20%]`; None: all of it. DataError for brackets that say something else."""
    if "[" not in source.split:
        return source.split, None
    found = _SLICE.fullmatch(source.split)
    if found is None:
        raise DataError(
            f"{_shown(source)}: split {source.split!r} cannot be read; as train[:100], train[100:200], train[:10%]"
        )
    return found["split"], (found["first"], found["end"])


def _part_of(rows: Iterator[Row], part: tuple[str | None, str | None], name: str) -> Iterator[Row]:
    """Rows from the first place to before the second; those are read to the end where a place counts from there."""
    if all(place is None or (not place.startswith("-") and not place.endswith("%")) for place in part):
        yield from islice(rows, int(part[0] or 0), None if part[1] is None else int(part[1]))
        return
    every = list(rows)
    first, end = (
        None if place is None else int(place) if not place.endswith("%") else round(int(place[:-1]) / 100 * len(every))
        for place in part
    )
    if not every[first:end]:
        raise DataError(f"{name}: of its {len(every)} rows none is in the part that `split` names")
    yield from every[first:end]


def _silence(text: str) -> None:
    """For callers that want no notes."""


def _rows(source: SourceConfig, streaming: bool, root: Path | None, note: Note) -> Iterator[Row]:
    if source.path in PACKAGED:
        yield from _file(source, Path(__file__).parent.parent / "demo" / PACKAGED[source.path], note, streaming)
        return
    if source.path.startswith(IN_MEMORY):
        _refuse_choice(source, "rows in memory")
        yield from _as_rows(rows_in_memory(source.path), "memory")
        return
    if source.path in STANDARD_INPUT:
        _refuse_choice(source, "standard input")
        yield from _file(source, from_pipe(None), note, streaming)
        return
    path = (root or Path()) / Path(source.path).expanduser()
    kind = kind_at(path)
    if kind == "file":
        _refuse_choice(source, "one file")
        yield from _file(source, path, note, streaming)
    elif kind == "pipe":
        _refuse_choice(source, "a pipe")
        yield from _file(source, from_pipe(path), note, streaming)
    elif kind == "folder":
        for file in files_of(path, source.split, source.subset, note):
            yield from _file(source, file, note, streaming)
    elif is_pattern(source.path) and not (looks_like_text(source.path) and not _names_of(path)):
        _refuse_choice(source, "a pattern of files")
        for file in _matching(path):
            yield from _file(source, file, note, streaming)
    else:
        _check_hub_name(source, path)
        yield from _hub(source, streaming)


def _refuse_choice(source: SourceConfig, what: str) -> None:
    """DataError for a split or subset of what has none."""
    requested = [f"subset {source.subset!r}"] if source.subset is not None else []
    requested += [f"split {source.split!r}"] if source.split not in ("train", WHOLE) else []
    if requested:
        raise DataError(
            f"{_shown(source)}: {' and '.join(requested)}: this is {what}, which has no splits or subsets; "
            "name the file that holds them, or their folder"
        )


def _matching(path: Path) -> list[Path]:
    """The data files that a pattern names, in the order of their names; folders stand for no files."""
    found = _names_of(path)
    files = [file for file in found if kind_at(file) == "file" and is_data(file)]
    if not files:
        what = f"none of the {len(found)} it names is a data file" if found else "no file has such a name"
        raise DataError(
            f"{shown(path)}: {what}; a pattern is written as data/*.jsonl, or data/**/*.jsonl with folders below"
        )
    return files


def _names_of(path: Path) -> list[Path]:
    """What a pattern names, in the order of names."""
    return sorted(Path(name) for name in islice(iglob(str(path), recursive=True), _MOST_MATCHES))


def _file(source: SourceConfig, path: Path, note: Note, streaming: bool) -> Iterator[Row]:
    items = _decoded(read_file(path, note, streaming, plain_text=source.format == "text"), path)
    yield from _as_rows(items, path.name, path.parent)


def _as_rows(items: Iterator[Item], place: str, folder: Path | None = None) -> Iterator[Row]:
    for number, value in items:
        if isinstance(value, dict):
            yield Row(place, number, value, folder=folder)
        elif isinstance(value, RowProblem):
            yield Row(place, number, {}, str(value))
        else:
            yield Row(place, number, {}, f"not an object: the row is {describe(value)}")


def _decoded(items: Iterator[Item], path: Path) -> Iterator[Item]:
    """The same rows; bytes that turn out not to be text, beyond what was looked at first, are a DataError."""
    number = 0
    while True:
        try:
            number, value = next(items)
        except StopIteration:
            return
        except DataError as error:
            raise DataError(naming_sources(str(error))) from error
        except UnicodeError as error:
            encoding = getattr(error, "encoding", "text").upper()
            raise DataError(f"{shown(path)}: after row {number} come bytes that are not {encoding}") from error
        except OSError as error:
            raise DataError(f"{shown(path)}: cannot be read on after row {number}: {error.strerror}") from error
        yield number, value


def _check_hub_name(source: SourceConfig, path: Path) -> None:
    """Raise DataError for a path that cannot be the name of a hub dataset."""
    if HUB_NAME.fullmatch(source.path) and not is_data(path) and len(source.path) <= _LONGEST_HUB_NAME:
        return
    beside = path.parent.iterdir() if kind_at(path.parent) == "folder" else ()
    hint = did_you_mean(path.name, [file.name for file in beside if is_data(file)])
    if looks_like_text(source.path):
        raise DataError(f"there is no file or folder {shown(source.path)}; {TEXT_AS_ROWS}")
    raise DataError(f"there is no file or folder {shown(path.absolute())}{hint[:500]}")


def _hub(source: SourceConfig, streaming: bool) -> Iterator[Row]:
    folder, within = folder_of_files()
    for number, values in enumerate(rows_of(source.path, source.split, source.subset, streaming), start=1):
        values = {key: without_filled(value) for key, value in values.items()}
        yield Row(source.path, number, values, folder=folder, within=within)


def _replaced(rows: Iterator[Row], replace: Mapping[str, str]) -> Iterator[Row]:
    if not replace:
        yield from rows
        return
    pattern = re.compile("|".join(re.escape(key) for key in sorted(replace, key=len, reverse=True)))

    def put(text: str) -> str:
        return pattern.sub(lambda found: replace[found.group()], text)

    for row in rows:
        yield dataclasses.replace(row, values=_in_texts(row.values, put))


def _in_texts(value: Any, put: Callable[[str], str]) -> Any:
    """The same value with every text in it put through `put`."""
    if isinstance(value, str):
        return put(value)
    if isinstance(value, dict):
        return {key: _in_texts(item, put) for key, item in value.items()}
    return [_in_texts(item, put) for item in value] if isinstance(value, list) else value
