"""Where rows come from: files, folders, the packaged dataset, the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.columns import RowProblem, describe
from lowrank.data.config import SourceConfig
from lowrank.data.encodings import Note
from lowrank.data.json_files import Item
from lowrank.data.readers import READERS
from lowrank.errors import DataError, did_you_mean

PACKAGED = {"lowrank/demo": "train.jsonl", "lowrank/demo-heldout": "heldout.jsonl"}
"""Names of the dataset that ships with the package."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLITS = {
    "train": re.compile(r"(^|[/_.-])(train|training)([/_.-]|$)"),
    "test": re.compile(r"(^|[/_.-])(test|testing|eval|heldout|held-out)([/_.-]|$)"),
    "validation": re.compile(r"(^|[/_.-])(valid|validation|val|dev)([/_.-]|$)"),
}


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
    rows = _replaced(_rows(source, streaming, root, note), source.replace)
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


def _silence(text: str) -> None:
    """For callers that want no notes."""


def _rows(source: SourceConfig, streaming: bool, root: Path | None, note: Note) -> Iterator[Row]:
    if source.path in PACKAGED:
        yield from _file(Path(__file__).parent / "demo" / PACKAGED[source.path], note, streaming)
        return
    path = (root or Path()) / Path(source.path).expanduser()
    if path.is_file():
        yield from _file(path, note, streaming)
    elif path.is_dir():
        for file in _files_of(path, source.split, note):
            yield from _file(file, note, streaming)
    else:
        _check_hub_name(source, path)
        yield from _hub(source, streaming, path)


def _file(path: Path, note: Note, streaming: bool) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: files ending in {path.suffix or 'nothing'!r} cannot be read, those ending in "
            f"{', '.join(READERS)} can; unpack archives first"
        )
    items = _decoded(reader(path, note, streaming), path)
    for number, value in items:
        if isinstance(value, dict):
            yield Row(path.name, number, value)
        elif isinstance(value, RowProblem):
            yield Row(path.name, number, {}, str(value))
        else:
            yield Row(path.name, number, {}, f"not an object: the row is {describe(value)}")


def _decoded(items: Iterator[Item], path: Path) -> Iterator[Item]:
    """The same rows; bytes that turn out not to be text, beyond what was looked at first, are a DataError."""
    number = 0
    while True:
        try:
            number, value = next(items)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: after row {number} come bytes that are not {error.encoding.upper()}") from error
        yield number, value


def _files_of(folder: Path, split: str, note: Note) -> list[Path]:
    """The data files of a folder and those below it, in the order of their names.

    Where names tell splits apart, those of `split`; other splits and other files are left out and noted.
    """
    visible = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = [file for file in visible if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    kept = [file for file in files if file.suffix.lower() in READERS and not _describes(file)]
    splits = {file: _split_of(file.relative_to(folder)) for file in kept}
    if len(set(splits.values())) > 1:
        kept = [file for file in kept if splits[file] == split]
    if not kept:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:10]) or "no file at all"
        raise DataError(
            f"{folder}: no data file of the split {split!r} in this folder, which has {names}; set `split`, or name a "
            f"file that ends in {', '.join(READERS)}"
        )
    left = [str(file.relative_to(folder)) for file in files if file not in kept]
    if left:
        note(f"left out in {folder.name}: {', '.join(left[:10])}{' ...' if len(left) > 10 else ''}")
    return kept


def _describes(file: Path) -> bool:
    """Files that `datasets` and LLaMA-Factory put beside data."""
    return file.name in ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def _split_of(file: Path) -> str | None:
    name = file.with_suffix("").as_posix().lower()
    return next((split for split, pattern in _SPLITS.items() if pattern.search(name)), None)


def _check_hub_name(source: SourceConfig, path: Path) -> None:
    """Raise DataError for a path that cannot be the name of a hub dataset."""
    if _HUB_NAME.fullmatch(source.path) and path.suffix.lower() not in READERS:
        return
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    hint = did_you_mean(path.name, [file.name for file in beside if file.suffix.lower() in READERS])
    raise DataError(f"there is no file or folder {path.absolute()}{hint[:500]}")


def _hub(source: SourceConfig, streaming: bool, path: Path) -> Iterator[Row]:
    import datasets  # takes as long to import as torch, and only hub names need it

    try:
        dataset = datasets.load_dataset(source.path, name=source.subset, split=source.split, streaming=streaming)
    except Exception as error:  # whatever the network, the hub, or a data file there brings
        words = " ".join(str(error).split())[:300]
        raise DataError(
            f"there is no file or folder {path.absolute()}, and {source.path!r} cannot be loaded from the hub "
            f"(split {source.split!r}{f', subset {source.subset!r}' if source.subset else ''}): {words}"
        ) from error
    for number, values in enumerate(dataset, start=1):
        yield Row(source.path, number, dict(values))  # type: ignore[arg-type]  # its stubs say list


def _replaced(rows: Iterator[Row], replace: Mapping[str, str]) -> Iterator[Row]:
    if not replace:
        yield from rows
        return
    pattern = re.compile("|".join(re.escape(key) for key in sorted(replace, key=len, reverse=True)))

    def put(text: str) -> str:
        return pattern.sub(lambda found: replace[found.group()], text)

    for row in rows:
        yield Row(row.place, row.number, _in_texts(row.values, put), row.problem)


def _in_texts(value: Any, put: Callable[[str], str]) -> Any:
    """The same value with every text in it put through `put`."""
    if isinstance(value, str):
        return put(value)
    if isinstance(value, dict):
        return {key: _in_texts(item, put) for key, item in value.items()}
    return [_in_texts(item, put) for item in value] if isinstance(value, list) else value
