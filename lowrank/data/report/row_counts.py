"""Counting what happens to the rows of one dataset, while they are read."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b

from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.formats.columns import RowProblem, kind_of
from lowrank.data.report.media_counts import MediaCounts, refuse_other_marks
from lowrank.data.sources.rows import Row
from lowrank.records import KIND_NAMES, Record

_PLACES_KEPT = 5
_MOST_KEYS = 200
"""Different unread keys that are counted by name; where keys are data themselves, there is no end to them."""
OTHER_KEYS = "still other keys"
_MEDIA = {"image": "an image", "img": "an image", "video": "a video", "audio": "sound"}
_MEDIUM = re.compile(
    r"<\|?(?:start_of_|begin_of_)?(?P<kind>image|video|audio)(?:_pad|_soft_token|_token)?\|?>|\[(?P<short>IMG)\]",
    re.IGNORECASE,
)
"""How data sets and models write that a picture, film or sound stands here: `<image>`, `<|image_pad|>`, `[IMG]`."""
_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
_LONE_SURROGATE = re.compile(r"(?<!\\)(?:\\\\)*\\ud[89a-f][0-9a-f]{2}")
"""As `repr` writes it; a backslash that stands in the text itself is doubled there."""


@dataclass(frozen=True)
class Finding:
    """Something that happened to `count` rows: what, the first of them, and how it reads for the very first."""

    what: str
    count: int
    rows: tuple[str, ...]
    example: str


@dataclass
class Findings:
    """Findings being counted, by what they are."""

    counts: Counter[str] = field(default_factory=Counter)
    rows: dict[str, list[str]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, place: str, example: str = "") -> None:
        """One more row of this kind."""
        self.counts[what] += 1
        if self.counts[what] == 1:
            self.rows[what], self.examples[what] = [], example or what
        if self.counts[what] <= _PLACES_KEPT:
            self.rows[what].append(place)

    def list(self) -> tuple[Finding, ...]:
        """The most frequent first."""
        ordered = self.counts.most_common()
        return tuple(Finding(what, count, tuple(self.rows[what]), self.examples[what]) for what, count in ordered)


def place_of(row: Row, files: set[str]) -> str:
    """`"row 7"`, with the file's name once the dataset has more than one."""
    files.add(row.place)
    return f"row {row.number}" if len(files) == 1 else f"{row.place} row {row.number}"


class RowCounts:
    """Counts for one dataset. `learn_digests=False` for streams: no memory per row."""

    def __init__(
        self, path: str, title: str, use: str, format_name: str, record: type, *, learn_digests: bool = True
    ) -> None:
        self.path, self.title, self.use, self.format, self.record = path, title, use, format_name, record
        self.num_read = self.num_used = self.num_samples = self.num_several = self.num_truncated = 0
        self.truncated_tokens = self.tokens = self.learned_tokens = self.num_held_out = self.num_not_drawn = 0
        self.dropped, self.truncated, self.refused, self.leaked = Findings(), Findings(), Findings(), Findings()
        self.duplicates, self.schemas, self.placeholders = Findings(), Findings(), Findings()
        self.unread_of_entry: tuple[str, ...] = ()
        self.unread, self.spelled = Findings(), Findings()
        self.notes: list[str] = []
        self.media = {kind: MediaCounts(kind) for kind in KIND_NAMES}
        self.lengths = array("I")
        self.digests: dict[int, str] | None = {} if learn_digests else None
        self._files: set[str] = set()

    def read(self, row: Row) -> str:
        """A row came out of its file. Its place, in words."""
        self.num_read += 1
        place = place_of(row, self._files)
        if row.problem is None:
            self.schemas.add(", ".join(row.values), place)
        return place

    def drop(self, place: str, problem: str, refused: bool = False) -> None:
        """It cannot be used."""
        (self.refused if refused else self.dropped).add(kind_of(problem), place, problem)

    def take(self, place: str, rendering: Rendering) -> None:
        """It became segments."""
        self.num_used += 1
        self.num_samples += len(rendering.samples)
        self.num_several += len(rendering.samples) > 1
        for token in rendering.spelled:
            self.spelled.add(token, place)
        if rendering.truncated_tokens:
            self.num_truncated += 1
            self.truncated_tokens += rendering.truncated_tokens
            self.truncated.add("too long", place, f"{rendering.truncated_tokens} tokens cut off at its end")
        for segment in rendering.segments:
            self.lengths.append(len(segment))
            self.tokens += len(segment)
            self.learned_tokens += int((segment.weight_L > 0).sum())
        for counts in self.media.values():
            counts.add(rendering.segments, place)

    def leave_unread(self, place: str, names: Iterable[str], ignored: Container[str] = ()) -> None:
        """Nobody read these keys of a usable row; the `ignored` are known."""
        for name in names:
            if name not in ignored:
                known = name in self.unread.counts or len(self.unread.counts) < _MOST_KEYS
                self.unread.add(name if known else OTHER_KEYS, place)

    def recognize(self, place: str, record: Record) -> int:
        """Look for placeholders and earlier rows with the same record. A digest, equal for equal records.

        Raises RowProblem for half characters, at which tokenizers break, and for placeholders of pictures and sound
        (a `<video>` that is closed again is HTML).
        """
        written = repr(record)
        if "\\ud" in written and _LONE_SURROGATE.search(written):
            raise RowProblem("broken text: it has half a character (a lone surrogate such as \\ud83d); save it again")
        for found in _MEDIUM.finditer(written):
            mark = found[0]
            if f"{mark[0]}/{mark[1:]}" not in written:
                raise refuse_other_marks(mark, _MEDIA[(found["kind"] or found["short"]).lower()])
        if "{{" in written:
            for name in set(_PLACEHOLDER.findall(written)):
                self.placeholders.add(name, place)
        key = int.from_bytes(blake2b(written.encode(), digest_size=8).digest(), "little")
        if self.digests is not None:
            first = self.digests.setdefault(key, place)
            if first != place:
                self.duplicates.add("duplicate", place, f"{place} repeats {first}")
        return key
