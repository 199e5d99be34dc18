"""Statistics of the data and of what happens to its rows, and the sentences and tables that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lowrank.data.formats.columns import COLUMNS
from lowrank.data.formats.unread import is_provenance
from lowrank.data.report.row_counts import OTHER_KEYS, Finding, RowCounts
from lowrank.errors import near

_KEYS_OF_TURNS = {"role", "content", "from", "value", "tool_calls", "weight", "reasoning_content", "name"}
_RARELY_LEARNED = 0.01
_PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class DatasetReport:
    """One dataset. Rows: `read` = `used` + `dropped` + `refused`; lengths are of its samples."""

    path: str
    title: str
    """What messages call it; the path, but for rows in memory."""
    use: str
    format: str
    record: str
    read: int
    used: int
    samples: int
    dropped: tuple[Finding, ...]
    refused: tuple[Finding, ...]
    truncated: Finding | None
    truncated_tokens: int
    several: int
    """Rows that became more than one sample (`on_too_long: split`, or one per answer)."""
    held_out: int
    not_drawn: int
    duplicates: Finding | None
    leaked: Finding | None
    """Rows that stand in a held-out dataset as well."""
    schemas: tuple[Finding, ...]
    """The different sets of columns."""
    placeholders: tuple[Finding, ...]
    unread: tuple[Finding, ...]
    """Columns and keys of turns that nobody read, of the rows that are used."""
    unread_of_entry: tuple[str, ...]
    """Keys of its entry in dataset_info.json."""
    spelled: tuple[Finding, ...]
    """Control tokens of the model that texts spell, and that are read as text."""
    notes: tuple[str, ...]
    pictures: int = 0
    picture_tokens: int = 0
    videos: int = 0
    video_tokens: int = 0
    sounds: int = 0
    sound_tokens: int = 0
    """Of its samples."""

    @property
    def media_kinds(self) -> tuple[str, ...]:
        """The kinds of media that it has."""
        numbers = (("image", self.pictures), ("video", self.videos), ("audio", self.sounds))
        return tuple(kind for kind, number in numbers if number)

    @property
    def losses(self) -> list[str]:
        """What of it is not trained on, in words."""
        parts = [
            f"{_rows(finding)} of {self.read:,} left out: {_example(finding)}"
            for finding in (*self.refused, *self.dropped)
        ]
        if self.truncated:
            parts.append(f"{_rows(self.truncated)} cut at data.max_length, {self.truncated_tokens:,} tokens in all")
        return [f"{self.title}: {part}" for part in parts]

    @property
    def unread_keys(self) -> list[str]:
        """What stands in used rows and means nothing to their format, in words; what only says where a row is from is
        left to `provenance`."""
        texts = [f"the key {key!r} of its entry in dataset_info.json is not read" for key in self.unread_of_entry]
        texts += [_unread(finding) for finding in self.unread if not is_provenance(finding.what)]
        return [f"{self.title}: {text}" for text in texts]

    @property
    def provenance(self) -> list[str]:
        """Unread columns that by their names say where rows are from, in one sentence."""
        named = [finding for finding in self.unread if is_provenance(finding.what)]
        if not named:
            return []
        names = ", ".join(f"{finding.what!r} ({_rows(finding)})" for finding in named)
        return [f"{self.title}: not read, and by the name of no use to training: {names}"]

    @property
    def information(self) -> list[str]:
        """What was done as asked and is worth knowing, in words."""
        return [*self._done, *self.provenance]

    @property
    def _done(self) -> list[str]:
        parts = list(self.notes)
        if self.duplicates:
            parts.append(f"{_rows(self.duplicates)} repeated: {self.duplicates.example}")
        return [f"{self.title}: {part}" for part in parts]

    @property
    def oddities(self) -> list[str]:
        """What a person should look at though nothing is lost, in words."""
        parts: list[str] = []
        if self.leaked:
            parts.append(f"{_rows(self.leaked)} also in the held-out data, whose loss will look too good")
        if len(self.schemas) > 1:
            sets = "; ".join(f"{finding.count:,} x {finding.what}" for finding in self.schemas[:3])
            parts.append(f"mixed schemas: {len(self.schemas)} different sets of columns ({sets})")
        parts += [
            f"{_rows(finding)} with {finding.what!r} in their text, which is a token of this model: it is read as text "
            "(data.split_special_tokens: false makes it the token)"
            for finding in self.spelled
        ]
        if self.not_drawn:
            parts.append(f"{self.not_drawn:,} samples not drawn, since another dataset is used up first")
        parts += [
            f"{_rows(finding)} with the placeholder {finding.what}; fill it with `replace`"
            for finding in self.placeholders
            if finding.count >= max(3, self.read / 20)
        ]
        return [f"{self.title}: {part}" for part in parts]


@dataclass(frozen=True)
class Lengths:
    """Lengths of the training samples' segments, in the report's unit."""

    shortest: int
    mean: float
    longest: int
    percentiles: dict[int, int]
    histogram: tuple[tuple[int, int, int], ...]
    """(from, up to and with, how many), doubling in width."""


@dataclass(frozen=True)
class DataReport:
    """What the doctor found. `to_json` is plain data; `render_report` is for people."""

    unit: str
    """tokens, or characters where there was no tokenizer."""
    complete: bool
    """False for a stream of which only the beginning was read."""
    datasets: tuple[DatasetReport, ...]
    train_samples: int
    eval_samples: int
    train_tokens: int
    learned_share: float
    """Share of the training tokens (or characters) that carry loss."""
    lengths: Lengths | None
    template_notices: tuple[str, ...]
    shown: tuple[tuple[tuple[str, float], ...], ...]
    """Rendered samples, as pieces of text with their loss weight; of a pair the chosen one, then the rejected."""
    pairs_shown: bool = False
    """What is shown are pairs, of which the rejected answer is trained against."""

    @property
    def losses(self) -> list[str]:
        """Everything that is not trained on, in words; what `strict` refuses."""
        return [loss for dataset in self.datasets for loss in dataset.losses]

    @property
    def unread(self) -> list[str]:
        """Every column and key that nobody reads, in words; `strict` refuses them as well."""
        return [text for dataset in self.datasets for text in (*dataset.unread_keys, *dataset.provenance)]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is lost, and what a person should look at."""
        odd = [text for dataset in self.datasets for text in (*dataset.unread_keys, *dataset.oddities)]
        if self.train_tokens and 0 < self.learned_share < _RARELY_LEARNED:
            odd.append(f"only {self.learned_share:.2%} of the {self.unit} carry loss")
        return (*self.losses, *odd, *self.template_notices)

    @property
    def information(self) -> tuple[str, ...]:
        """What is worth knowing and needs no mending."""
        texts = [text for dataset in self.datasets for text in dataset.information]
        if not self.complete:
            texts.append("streaming: only the beginning of the data has been looked at")
        return tuple(texts)

    @property
    def notices(self) -> tuple[str, ...]:
        """Everything a person should know, in words: losses first."""
        return (*self.warnings, *self.information)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, with the sentences of `notices`."""
        return {**asdict(self), "losses": self.losses, "notices": list(self.notices)}


def build_report(
    all_row_counts: Sequence[RowCounts],
    *,
    unit: str,
    template_notices: Iterable[str] = (),
    shown: Sequence[Sequence[tuple[str, float]]] = (),
    pairs_shown: bool = False,
    complete: bool = True,
) -> DataReport:
    """The report on what was counted. Lengths and shares are those of the training data."""
    train = [row_counts for row_counts in all_row_counts if row_counts.use == "train"]
    tokens, learned = (
        sum(row_counts.tokens for row_counts in train),
        sum(row_counts.learned_tokens for row_counts in train),
    )
    held_out = sum(row_counts.num_held_out for row_counts in train)
    evaluated = sum(row_counts.num_samples for row_counts in all_row_counts if row_counts.use == "eval")
    trained = sum(row_counts.num_samples - row_counts.num_held_out - row_counts.num_not_drawn for row_counts in train)
    return DataReport(
        unit=unit,
        complete=complete,
        datasets=tuple(_dataset(row_counts, unit) for row_counts in all_row_counts),
        train_samples=trained,
        eval_samples=evaluated + held_out,
        train_tokens=tokens,
        learned_share=learned / tokens if tokens else 0.0,
        lengths=_lengths(train),
        template_notices=tuple(template_notices),
        shown=tuple(tuple(sample) for sample in shown),
        pairs_shown=pairs_shown,
    )


def _dataset(row_counts: RowCounts, unit: str) -> DatasetReport:
    return DatasetReport(
        path=row_counts.path,
        title=row_counts.title,
        use=row_counts.use,
        format=row_counts.format,
        record=row_counts.record.__name__,
        read=row_counts.num_read,
        used=row_counts.num_used,
        samples=row_counts.num_samples,
        dropped=row_counts.dropped.list(),
        refused=row_counts.refused.list(),
        truncated=next(iter(row_counts.truncated.list()), None),
        truncated_tokens=row_counts.truncated_tokens,
        several=row_counts.num_several,
        held_out=row_counts.num_held_out,
        not_drawn=row_counts.num_not_drawn,
        duplicates=next(iter(row_counts.duplicates.list()), None),
        leaked=next(iter(row_counts.leaked.list()), None),
        schemas=row_counts.schemas.list(),
        placeholders=row_counts.placeholders.list(),
        unread=row_counts.unread.list(),
        unread_of_entry=row_counts.unread_of_entry,
        spelled=row_counts.spelled.list(),
        notes=(
            *row_counts.notes,
            *(line for each in row_counts.media.values() for line in each.sentences(row_counts.tokens, unit)),
        ),
        pictures=row_counts.media["image"].number,
        videos=row_counts.media["video"].number,
        video_tokens=row_counts.media["video"].tokens,
        sounds=row_counts.media["audio"].number,
        sound_tokens=row_counts.media["audio"].tokens,
        picture_tokens=row_counts.media["image"].tokens,
    )


def _lengths(all_row_counts: Sequence[RowCounts]) -> Lengths | None:
    parts = [np.frombuffer(row_counts.lengths, np.uint32) for row_counts in all_row_counts if len(row_counts.lengths)]
    if not parts:
        return None
    every = np.concatenate(parts)
    top = int(every.max())
    edges = [0, *(2**power for power in range(4, max(5, (top - 1).bit_length() + 1)))]
    counts = [int(((every > low) & (every <= high)).sum()) for low, high in pairwise(edges)]
    filled = [index for index, count in enumerate(counts) if count]
    bars = range(filled[0], filled[-1] + 1)
    return Lengths(
        shortest=int(every.min()),
        mean=float(every.mean()),
        longest=top,
        percentiles={share: int(np.percentile(every, share, method="inverted_cdf")) for share in _PERCENTILES},
        histogram=tuple((edges[index] + 1, edges[index + 1], counts[index]) for index in bars),
    )


def _rows(finding: Finding) -> str:
    """`"3 rows (row 2, row 7, row 9)"`."""
    more = ", ..." if finding.count > len(finding.rows) else ""
    return f"{finding.count:,} {'row' if finding.count == 1 else 'rows'} ({', '.join(finding.rows)}{more})"


def _unread(finding: Finding) -> str:
    if finding.what == OTHER_KEYS:
        return f"{OTHER_KEYS} are not read: {finding.count:,} times"
    *_, key = finding.what.split(".")
    known = {name for names in COLUMNS.values() for name in names} if key == finding.what else _KEYS_OF_TURNS
    close = near(key, known - {key})
    what = f"the column {key!r}" if key == finding.what else f"the key {finding.what!r}"
    return f"{what} is not read by this format: {_rows(finding)}" + (f"; did you mean {close!r}?" if close else "")


def _example(finding: Finding) -> str:
    """In full if it happened once, else `"too long; the first: 4324 tokens, ..."`."""
    detail = finding.example.removeprefix(finding.what).lstrip(": ")
    return finding.example if finding.count == 1 or not detail else f"{finding.what}; the first: {detail}"
