"""Rows that a Python caller has in memory: a list of dicts, a `datasets.Dataset`, a DataFrame, a generator.

They go by the digest of their content, `memory:3f9c...`, which stands in the settings like any path: the same rows have
the same name in the next process, so a run goes on with them, and caches of what was computed on them are found. They
are kept once, for as long as somebody holds what `keep_rows` returned.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time
from typing import Any, Union
from weakref import WeakValueDictionary

from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.formats.columns import RowProblem
from lowrank.data.sources.json_files import Item
from lowrank.data.sources.places import TEXT_AS_ROWS
from lowrank.data.sources.readers import without_filled
from lowrank.data.sources.undecoded import undecoded_rows
from lowrank.errors import DataError
from lowrank.media.decoding import from_pillow
from lowrank.third_party import call_problem

RowsLike = Union[Iterable[Mapping[str, Any]], Callable[[], Iterable[Mapping[str, Any]]]]  # noqa: UP007 (Python 3.10)
"""Rows, or a function without arguments that yields them (what `datasets.Dataset.from_generator` takes)."""

IN_MEMORY = "memory:"
"""What the `path` of such a source begins with."""


class RowsInMemory:
    """Rows as they were when they were given, one JSON text each; `path` is their name in the settings."""

    def __init__(self, rows: RowsLike) -> None:
        digest = hashlib.blake2b(digest_size=12)
        self._texts: list[bytes] = []
        first, are_rows = None, False
        for number, row in enumerate(_each(rows), start=1):
            first, are_rows = row if number == 1 else first, are_rows or isinstance(row, Mapping)
            text = _encoded(row, number)
            digest.update(len(text).to_bytes(8, "little") + text)
            self._texts.append(text)
        if self._texts and not are_rows:
            raise DataError(f"data: rows are dicts, and the first of these is a {type(first).__name__}; {TEXT_AS_ROWS}")
        self.path = f"{IN_MEMORY}{digest.hexdigest()}"

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[Item]:
        """`(number, row)`; the first is 1."""
        for number, text in enumerate(self._texts, start=1):
            row = json.loads(text)
            yield number, RowProblem(row[_PROBLEM]) if _PROBLEM in row else row


_PROBLEM = "\0problem"
_held: WeakValueDictionary[str, RowsInMemory] = WeakValueDictionary()


def keep_rows(rows: RowsLike, settings: SourceConfig | None = None) -> SourceConfig:
    """Rows as a dataset of the settings; `settings` has the source's others (`format`, `columns`, `max_samples` ...).

    A generator is read to its end, once. DataError if `rows` are not rows, or there are none.
    """
    read = RowsInMemory(rows)
    if not len(read):
        raise DataError("data: there are no rows in what was given")
    kept = _held.setdefault(read.path, read)
    source = SourceConfig(path="") if settings is None else settings
    source = source.model_copy(update={"path": kept.path})
    source._held = kept  # pyright: ignore[reportPrivateUsage] (pydantic keeps fields that are no settings so)
    return source


def title_of(path: str, given_as: str) -> str:
    """What messages call a dataset: its path, or, of rows in memory, the argument (`data.train`) they were given as."""
    return f"the rows given as {given_as}" if path.startswith(IN_MEMORY) else path


def titled_sources(config: DataConfig, given_as: str | None = None) -> Iterator[tuple[str, int, SourceConfig, str]]:
    """`(use, number, source, title)` of every dataset of the settings, those for training first; `title` as of
    `title_of`. `given_as`: the argument that rows came by, where it is not `data.train` or `data.eval`."""
    for use, sources in (("train", config.train), ("eval", config.eval)):
        for number, source in enumerate(sources):
            place = given_as or (f"data.{use}" if len(sources) == 1 else f"data.{use}.{number}")
            yield use, number, source, title_of(source.path, place)


def rows_in_memory(path: str) -> Iterator[Item]:
    """The rows that go by this name. DataError if nobody holds them any more."""
    kept = _held.get(path)
    if kept is None:
        raise DataError(
            f"{path} were rows in the memory of a Python process, and they are not in this one; give them again "
            "(lowrank.train(..., data=rows); to go on with a run, lowrank.TrainedRun(RUN).resume(objects=[rows])), or "
            "name a file"
        )
    return iter(kept)


def _each(rows: Any) -> Iterator[Any]:
    """The rows of whatever holds some."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise DataError(
            f"data: rows are a list of dicts, a datasets.Dataset, a DataFrame or a generator, not a "
            f"{type(rows).__name__}; a file is named by data='path'"
        )
    if hasattr(rows, "column_names") and isinstance(rows.column_names, dict):
        raise DataError(
            f"data: this holds several splits ({', '.join(rows.column_names)}); give one, as dataset['train']"
        )
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):  # a DataFrame, whose gaps are NaN
        yield from ({key: None if value != value else value for key, value in row.items()} for row in
                    rows.to_dict("records"))  # fmt: skip
        return
    if hasattr(rows, "features") and hasattr(rows, "column_names"):  # of datasets, which fills nested gaps with None
        yield from ({key: without_filled(value) for key, value in row.items()} for row in undecoded_rows(rows))
        return
    if callable(rows) and not isinstance(rows, Iterable):
        if problem := call_problem(rows):
            name = getattr(rows, "__qualname__", repr(rows))
            raise DataError(f"data: a function that returns the rows takes no arguments; {name} {problem}")
        rows = rows()
    if not isinstance(rows, Iterable):
        raise DataError(f"data: rows are a list of dicts, a datasets.Dataset, a DataFrame or a generator, not a "
                        f"{type(rows).__name__}")  # fmt: skip
    yield from rows


def _encoded(row: Any, number: int) -> bytes:
    if not isinstance(row, Mapping):
        return json.dumps({_PROBLEM: f"not an object: the row is a {type(row).__name__}"}).encode()
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError) as error:
        return json.dumps({_PROBLEM: f"row {number}: {error}"}).encode()


def _plain(value: Any) -> Any:
    """What JSON does not know of what tables hold."""
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (bytes, bytearray)):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if hasattr(value, "getexif"):  # a picture of Pillow's
        return {"base64": base64.b64encode(from_pillow(value)).decode("ascii")}
    if hasattr(value, "tolist"):  # numpy
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is nothing that text can be learned from; leave its column out")
