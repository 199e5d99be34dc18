"""From the data settings of a job to what it trains on: rows, records, segments, a dataloader, and a report on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lowrank.data.batching.dataloader import DataLoader, Sample, StreamingDataLoader
from lowrank.data.batching.mismatched import with_mismatched
from lowrank.data.batching.mixing import Row, flat, hold_out, mix, put_together
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.data.dataset import AnyRenderer, Dataset, open_datasets, read_samples
from lowrank.data.report.row_counts import RowCounts
from lowrank.data.report.statistics import DataReport, build_report
from lowrank.data.tokenized import check_record, is_written, read_tokenized, write_tokenized
from lowrank.errors import DataError, raise_all
from lowrank.records import KIND_NAMES, Preference
from lowrank.segments import Segment

_ROWS_AHEAD = 1000
"""Rows of a stream that are looked at before training begins."""
_ROWS_PER_NOTICE = 1000
_OF_THE_DATALOADER = {"batch_size", "batch_tokens", "shuffle"}

Progress = Callable[[int, int | None], None]
"""`(rows done, rows in all if known)`."""


@dataclass(frozen=True)
class Prepared:
    """What a job trains on.

    train    optimizer steps over the training samples
    eval     held-out segments; the two of a pair share a number in `pair`
    report   what happened to every row
    """

    train: DataLoader | StreamingDataLoader
    eval: list[Segment]
    report: DataReport

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that its rows have, of a stream those that were read."""
        found = {kind for dataset in self.report.datasets for kind in dataset.media_kinds}
        found |= self.train.media_kinds if isinstance(self.train, StreamingDataLoader) else set()
        return tuple(kind for kind in KIND_NAMES if kind in found)

    @property
    def has_pictures(self) -> bool:
        """Whether any of its rows shows some."""
        return "image" in self.media_kinds

    def for_another(self, config: DataConfig, seed: int) -> Prepared:
        """The same samples for another job whose `key_of_rows` is the same, with a dataloader of its own settings."""
        assert isinstance(self.train, DataLoader), "a stream is read by one job"
        return replace(self, train=DataLoader(self.train.samples, config, seed))


def key_of_rows(config: DataConfig, seed: int) -> str:
    """Equal for jobs whose rows become the same samples in the same order: what the dataloader alone reads does not
    count, and the seed only where it decides which rows those are."""
    sampled = any(each.max_samples is not None for each in (config, *config.train, *config.eval))
    drawn = config.mix != "concat" and len(config.train) > 1
    split = bool(config.validation_split) and not config.eval
    return f"{seed if sampled or drawn or split else None} {config.model_dump_json(exclude=_OF_THE_DATALOADER)}"


def prepare(
    config: DataConfig,
    *,
    tokenizer: Any,
    record: type,
    seed: int,
    mismatched: bool = False,
    source_root: Path | None = None,
    on_progress: Progress | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Prepared:
    """Everything from files to segments. `record` is the kind of record the objective learns from.

    `mismatched`: rated samples are followed by a segment of role MISMATCHED. `source_root`: where relative paths
    begin. `on_notice` is called at the end of a pass over a stream what was
    lost in it, each thing once; everything else stands in the report. Raises DataError: data that cannot be
    read, does not suit the objective, or has no usable row; any loss with `strict`; a sample too long with
    `on_too_long: error`.
    """
    _check_settings(config)
    kept = config.tokenized_path
    if kept is not None:
        check_record(record)
    if kept is not None and is_written(kept):
        return _prepare_tokenized(kept, config, tokenizer, record, seed)
    job = _Job(config, Renderer(tokenizer, config), seed, open_datasets(config, record, seed, source_root))
    if config.streaming:
        return _prepare_stream(job, mismatched, on_notice)
    samples, held_out, report = job.read_all(_Counter(on_progress))
    refuse(report, strict=config.strict)
    if kept is not None:
        if any(dataset.media_kinds for dataset in report.datasets):
            raise DataError(
                "data.tokenized_path: rows with pictures, videos or sounds are not kept tokenized; leave it out"
            )
        write_tokenized(kept, samples, held_out)
    if mismatched:
        samples = list(with_mismatched(samples, config.max_length))
        held_out = _mismatched(held_out, config.max_length)
    return Prepared(DataLoader(samples, config, seed), held_out, report)


def _prepare_tokenized(path: str, config: DataConfig, tokenizer: Any, record: type, seed: int) -> Prepared:
    """What an earlier run has kept at `data.tokenized_path`."""
    job = _Job(config, Renderer(tokenizer, config), seed, ())
    samples, held_out, all_row_counts = read_tokenized(path, record, config.max_length, len(tokenizer))
    for row_counts in all_row_counts:
        row_counts.notes.append(
            "read as it was tokenized before; settings that decide how rows are read have no effect"
        )
    report = job.report(all_row_counts, samples[: config.num_samples_shown])
    return Prepared(
        DataLoader(samples, config, seed), _as_eval([list(enumerate((each,) for each in held_out))]), report
    )


def examine(
    config: DataConfig,
    *,
    renderer: AnyRenderer,
    record: type | None = None,
    seed: int = 0,
    source_root: Path | None = None,
) -> DataReport:
    """The report alone, on every row, without refusing what `prepare` would refuse; a stream is not kept in memory.

    `record=None`: any kind of record will do.
    """
    _check_settings(config)
    job = _Job(config, renderer, seed, open_datasets(config, record, seed, source_root))
    if not config.streaming:
        return job.read_all(_Counter(None))[2]
    _, held_out, watched = job.read_eval()
    all_row_counts = [dataset.row_counts() for dataset in job.train]
    samples = chain.from_iterable(
        flat(read_samples(dataset, renderer, row_counts, held_out=watched))
        for dataset, row_counts in zip(job.train, all_row_counts)
    )
    shown = list(islice(samples, config.num_samples_shown))
    for _ in samples:
        pass  # counted as it goes by
    return job.report([*all_row_counts, *held_out], shown)


def _check_settings(config: DataConfig) -> None:
    if not config.train:
        raise DataError(
            "data.train: no dataset to train on; give at least one file, folder or hub name, or in Python rows"
        )
    if config.streaming and config.tokenized_path is not None:
        raise DataError("data.tokenized_path: a stream is not kept; leave streaming or tokenized_path out")
    if config.streaming and config.validation_split and not config.eval:
        raise DataError("data.validation_split: a stream has no end to split; give held-out files as data.eval")


class _Counter:
    """Rows over all datasets, told now and then."""

    def __init__(self, on_progress: Progress | None) -> None:
        self._on_progress, self._rows = on_progress, 0

    def one_more(self) -> None:
        self._rows += 1
        if self._on_progress and self._rows % _ROWS_PER_NOTICE == 0:
            self._on_progress(self._rows, None)

    def finish(self) -> None:
        if self._on_progress:
            self._on_progress(self._rows, self._rows)


class _Job:
    """The opened datasets of a job, and what turns them into segments."""

    def __init__(self, config: DataConfig, renderer: AnyRenderer, seed: int, datasets: Iterable[Dataset]) -> None:
        self.config, self.renderer, self.seed = config, renderer, seed
        self.train: list[Dataset] = []
        self.eval: list[Dataset] = []
        for dataset in datasets:
            (self.train if dataset.use == "train" else self.eval).append(dataset)

    def read_all(self, count: _Counter) -> tuple[list[Sample], list[Segment], DataReport]:
        """Training samples, held-out segments and the report, in memory."""
        held_out, eval_row_counts, watched = self.read_eval(count)
        all_row_counts = [dataset.row_counts() for dataset in self.train]
        parts = [
            list(read_samples(dataset, self.renderer, row_counts, held_out=watched, on_row=count.one_more))
            for dataset, row_counts in zip(self.train, all_row_counts)
        ]
        count.finish()
        if self.config.validation_split and not self.config.eval and any(parts):
            parts, held = hold_out(parts, all_row_counts, self.config.validation_split, self.seed)
            held_out = _as_eval(held)
        samples = put_together(self.config, parts, all_row_counts, self.seed)
        report = self.report([*all_row_counts, *eval_row_counts], samples[: self.config.num_samples_shown])
        return samples, held_out, report

    def read_eval(self, count: _Counter | None = None) -> tuple[list[Segment], list[RowCounts], dict[int, str]]:
        """Held-out segments, their counts, and the digest and place of each record."""
        on_row = count.one_more if count else None
        all_row_counts = [dataset.row_counts() for dataset in self.eval]
        parts = [
            list(read_samples(each, self.renderer, row_counts, on_row=on_row))
            for each, row_counts in zip(self.eval, all_row_counts)
        ]
        places = {
            key: f"{place} of {row_counts.title}"
            for row_counts in all_row_counts
            for key, place in (row_counts.digests or {}).items()
        }
        return _as_eval(parts), all_row_counts, places

    def report(self, all_row_counts: Sequence[RowCounts], shown: Iterable[Sample], complete: bool = True) -> DataReport:
        """On the rows counted; `shown` samples are rendered."""
        kinds = {row_counts.record for row_counts in all_row_counts if row_counts.use == "train"}
        return build_report(
            all_row_counts,
            pairs_shown=kinds == {Preference},
            unit="tokens" if isinstance(self.renderer, Renderer) else "characters",
            template_notices=self.renderer.notices,
            shown=[self.renderer.show(segment) for sample in shown for segment in sample],
            complete=complete,
        )


def _as_eval(parts: Iterable[Iterable[Row]]) -> list[Segment]:
    """Held-out segments in order, pairs numbered."""
    samples = chain.from_iterable(flat(part) for part in parts)
    return [
        replace(segment, pair=number) if segment.pair >= 0 else segment
        for number, sample in enumerate(samples)
        for segment in sample
    ]


def _mismatched(held_out: Sequence[Segment], max_length: int) -> list[Segment]:
    """Held-out rated segments, each followed by a mismatched one."""
    return list(chain.from_iterable(with_mismatched(((segment,) for segment in held_out), max_length)))


def refuse(report: DataReport, *, strict: bool) -> None:
    """Raise DataError for samples that must not be too long, datasets without a usable row, with `strict` any loss."""
    too_long = [loss for dataset in report.datasets if dataset.refused for loss in dataset.losses]
    raise_all(DataError, "data.on_too_long is error, and there are samples longer than data.max_length", too_long)
    if strict:
        way_out = "what is known to be of no use is listed in `ignored_columns` of its dataset (data --ignore NAME)"
        unread = [*report.unread, *([way_out] if report.unread else [])]
        raise_all(DataError, "strict: this data would be lost", [*report.losses, *unread])
    empty = [
        "\n    ".join(dataset.losses) or f"{dataset.title}: it has no rows"
        for dataset in report.datasets
        if not dataset.used
    ]
    raise_all(DataError, "there are datasets without a single usable row", empty)


def _prepare_stream(job: _Job, mismatched: bool, on_notice: Callable[[str], None] | None) -> Prepared:
    """A dataloader that reads as it goes; the report is on the first rows of each dataset."""
    held_out, eval_row_counts, watched = job.read_eval()
    all_row_counts = [dataset.row_counts() for dataset in job.train]
    first = [
        sample
        for dataset, row_counts in zip(job.train, all_row_counts)
        for sample in flat(read_samples(dataset, job.renderer, row_counts, held_out=watched, limit=_ROWS_AHEAD))
    ]
    report = job.report([*all_row_counts, *eval_row_counts], first[: job.config.num_samples_shown], complete=False)
    refuse(report, strict=job.config.strict)
    reported: set[str] = set()

    def begin() -> Iterator[Sample]:
        all_row_counts = [dataset.row_counts(learn_digests=False) for dataset in job.train]
        samples = _pass(job, all_row_counts, watched)
        yield from with_mismatched(samples, job.config.max_length) if mismatched else samples
        for notice in job.report(all_row_counts, ()).notices:
            if on_notice and notice not in reported:
                reported.add(notice)
                on_notice(notice)

    if mismatched:
        held_out = _mismatched(held_out, job.config.max_length)
    return Prepared(StreamingDataLoader(begin, job.config, job.seed), held_out, report)


def _pass(job: _Job, all_row_counts: Sequence[RowCounts], watched: Mapping[int, str]) -> Iterator[Sample]:
    """One pass over a stream. Raises DataError at the first loss that the settings refuse."""

    def part(dataset: Dataset, row_counts: RowCounts) -> Iterator[Sample]:
        for sample in flat(read_samples(dataset, job.renderer, row_counts, held_out=watched)):
            check(row_counts)
            yield sample
        check(row_counts)

    def check(row_counts: RowCounts) -> None:
        if row_counts.refused.counts or (
            job.config.strict
            and (
                row_counts.dropped.counts
                or row_counts.num_truncated
                or row_counts.unread.counts
                or row_counts.unread_of_entry
            )
        ):
            refuse(job.report([row_counts], ()), strict=job.config.strict)

    parts = [partial(part, dataset, row_counts) for dataset, row_counts in zip(job.train, all_row_counts)]
    yield from (sample for _, sample in mix(job.config, parts, job.seed))
