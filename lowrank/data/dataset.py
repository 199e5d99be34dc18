"""The datasets of a job, opened: their format known and checked, their rows turned into samples one by one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from lowrank.data.batching.dataloader import Sample
from lowrank.data.chat.last_answer import as_prompted
from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.formats.built_in import OBJECTIVES_OF, Format, built_in_formats, find_format, record_type
from lowrank.data.formats.columns import RowProblem, check_mapping
from lowrank.data.formats.media import with_media
from lowrank.data.formats.media_files import Folders
from lowrank.data.formats.recognition import recognize
from lowrank.data.formats.unread import KeyTrackingDict, unread
from lowrank.data.report.row_counts import RowCounts
from lowrank.data.sources.memory import title_of, titled_sources
from lowrank.data.sources.places import shown
from lowrank.data.sources.rows import Row, read_rows
from lowrank.errors import DataError, raise_all
from lowrank.records import Prompted, Record, Text
from lowrank.segments import Segment

_ROWS_TO_RECOGNIZE = 100
_MOST_PROBLEMS = 20


class AnyRenderer(Protocol):
    """What turns records into segments: `Renderer`, or `CharacterRenderer`."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What a person should know about how records are read, in whole sentences."""
        ...

    def render_many(self, records: Iterable[Record]) -> Iterator[Rendering]:
        """One rendering per record, in order. ModelError if the records cannot be read at all (no chat template)."""
        ...

    def takes(self, kind: str) -> bool:
        """Whether media of this kind (image, video, audio) can be shown."""
        ...

    def reads(self, field: str) -> bool:
        """Whether a field of turns, whose name comes last in `messages[].field`, has an effect."""
        ...

    def show(self, segment: Segment) -> list[tuple[str, float]]:
        """The segment as text in pieces of equal loss weight, `[(text, weight), ...]`."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A dataset whose format is known. `rows` begins a new pass over it; `use` is train or eval, `title` what messages
    call it."""

    source: SourceConfig
    title: str
    use: str
    name: str
    function: Format
    record: type
    rows: Callable[[Callable[[str], None]], Iterator[Row]]
    decodes_media: bool = False

    def row_counts(self, *, learn_digests: bool = True) -> RowCounts:
        """A fresh count."""
        row_counts = RowCounts(
            self.source.path, self.title, self.use, self.name, self.record, learn_digests=learn_digests
        )
        row_counts.unread_of_entry = tuple(
            key for key in self.source.unread_keys if key not in self.source.ignored_columns
        )
        return row_counts


def open_datasets(
    config: DataConfig, record: type | None, seed: int, root: Path | None, *, given_as: str | None = None
) -> list[Dataset]:
    """Every dataset of the settings, those for training first. Looks at the first rows of each.

    `given_as`: the argument that rows in memory came by, for messages; left out: `data.train` or `data.eval`.
    Raises one DataError for everything that is wrong: a dataset that cannot be read or recognized, or whose
    records are not of the kind `record` (None: any kind will do).
    """
    opened: list[Dataset] = []
    problems: list[str] = []
    for use, number, source, title in titled_sources(config, given_as):
        try:
            dataset = _open(config, source, title, use, seed, root, record)
            if record is Prompted and dataset.record is not Text:
                dataset = replace(dataset, function=as_prompted(dataset.function), record=Prompted)
            if record is not None:
                _check_record(dataset, record)
            opened.append(dataset)
        except DataError as error:
            problems.append(f"{use}.{number}: {error}")
    if len(problems) > _MOST_PROBLEMS:  # as many texts, given where paths are expected
        problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
    raise_all(DataError, "the data cannot be used", problems)
    return opened


def _open(
    config: DataConfig,
    source: SourceConfig,
    title: str,
    use: str,
    seed: int,
    root: Path | None,
    record: type | None,
) -> Dataset:
    folder = source.media_folder
    if folder is not None and not os.path.isdir(folder):
        raise DataError(f"{title}: media_dir: there is no folder {shown(folder)}")
    streaming = config.streaming and use == "train"
    name = source.format or _recognized(source, title, streaming, root, record)
    if name in built_in_formats():
        check_mapping(title, source.columns, source.tags)
    function = find_format(name)

    def rows(note: Callable[[str], None]) -> Iterator[Row]:
        return read_rows(source, seed=seed, max_samples=config.max_samples, streaming=streaming, root=root, note=note)

    return Dataset(source, title, use, name, function, record_type(function), rows, config.check_pictures == "decode")


def _recognized(source: SourceConfig, title: str, streaming: bool, root: Path | None, record: type | None) -> str:
    """The format of the first rows of the file, whatever `max_samples` will choose."""
    everything = source.model_copy(update={"max_samples": None})
    first = list(islice(read_rows(everything, seed=0, streaming=streaming, root=root), _ROWS_TO_RECOGNIZE))
    good = [row.values for row in first if row.problem is None]
    if not good:
        reason = f"its first row: {first[0].problem}" if first else "it has no rows"
        raise DataError(f"{title}: {reason}")
    try:
        return recognize(good, source.columns, record)
    except DataError as error:
        raise DataError(f"{title}: {error}") from error


def _check_record(dataset: Dataset, record: type) -> None:
    if dataset.record is not record:
        raise DataError(
            f"{dataset.title} (format {dataset.name}) gives {dataset.record.__name__} records, the objective "
            f"learns from {record.__name__}\n    such data is for {OBJECTIVES_OF[dataset.record]}; "
            f"{record.__name__} is for {OBJECTIVES_OF[record]}; change `objective`, the data, or `format`"
        )


def read_samples(
    dataset: Dataset,
    renderer: AnyRenderer,
    row_counts: RowCounts,
    *,
    held_out: Mapping[int, str] | None = None,
    limit: int | None = None,
    on_row: Callable[[], None] | None = None,
) -> Iterator[tuple[int, tuple[Sample, ...]]]:
    """`(digest of the record, its samples)` of every row that can be used; everything else is counted in `row_counts`.

    held_out   digests of held-out records; rows that are among them are counted as leaks
    limit      rows to read at the most
    """
    waiting: deque[tuple[str, int]] = deque()

    def records() -> Iterator[Record]:
        for row in islice(dataset.rows(row_counts.notes.append), limit):
            place = row_counts.read(row)
            if on_row:
                on_row()
            try:
                values = KeyTrackingDict(row.values)
                record = read_record(replace(row, values=values), dataset, renderer.takes)
                key = row_counts.recognize(place, record)
                left = [name for name in unread(values) if not _of_turn(name) or not renderer.reads(name)]
                row_counts.leave_unread(place, left, dataset.source.ignored_columns)
            except RowProblem as problem:
                row_counts.drop(place, str(problem))
                continue
            if held_out and key in held_out:
                row_counts.leaked.add("leak", place, f"{place} is {held_out[key]} of the held-out data")
            waiting.append((place, key))
            yield record

    for rendering in renderer.render_many(records()):
        place, key = waiting.popleft()
        if rendering.segments:
            row_counts.take(place, rendering)
            yield key, rendering.samples
        else:
            row_counts.drop(place, rendering.problem or "nothing left", refused=rendering.refused)


def _of_turn(name: str) -> bool:
    """A key of a turn, as `unread` names it: those reach the chat template."""
    return "[]." in name


def read_record(row: Row, dataset: Dataset, takes: Callable[[str], bool]) -> Record:
    """The record of a row, with its media; RowProblem says why there is none. `takes`: whether the model takes those of
    a kind."""
    if row.problem is not None:
        raise RowProblem(row.problem)
    columns = dataset.source.columns
    try:
        record = dataset.function(row.values, columns, dataset.source.tags)
        folders = Folders(row.folder, dataset.source.media_folder, dataset.source.fetch_media, row.within)
        place = f"row {row.number} of {title_of(row.place, dataset.title)}"
        return with_media(record, row.values, columns, folders, takes=takes, decode=dataset.decodes_media, place=place)
    except RowProblem:
        raise
    except RecursionError as error:
        raise RowProblem("nested too deep") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a third party's function
        raise RowProblem(f"{dataset.name} fails: {type(error).__name__}: {error}") from error
