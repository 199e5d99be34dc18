"""Counting the pictures of one dataset: how many, how large a part of its tokens, and what is not shown as stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lowrank.batches import Segment
from lowrank.data.formats.columns import RowProblem


@dataclass
class PictureCounts:
    """Counts of the usable rows."""

    pictures: int = 0
    rows: int = 0
    tokens: int = 0
    most_tokens: int = 0
    largest: tuple[int, int] = (0, 0)
    different: set[str] = field(default_factory=set)
    peculiar: dict[str, list[str]] = field(default_factory=dict)
    """Places of the rows, by what is peculiar about a picture of theirs."""

    def add(self, segments: Iterable[Segment], place: str) -> None:
        """One more row, as its segments."""
        media = [segment.media for segment in segments if segment.media is not None]
        if not media:
            return
        self.rows += 1
        for each in media:
            counts = [end - first for first, end in each.spans]
            self.tokens += sum(counts)
            self.most_tokens = max(self.most_tokens, *counts)
            self.pictures += len(counts)
        for picture in {each.digest: each for one in media for each in one.pictures}.values():
            self.different.add(picture.digest)
            self.largest = max(self.largest, (picture.width, picture.height), key=lambda size: size[0] * size[1])
            for what in picture.notes:
                self.peculiar.setdefault(what, []).append(place)

    def sentences(self, tokens: int, unit: str) -> list[str]:
        """For a report; `tokens` are all of the dataset."""
        if not self.pictures:
            return []
        width, height = self.largest
        many = f"{self.pictures:,} pictures in {self.rows:,} rows, {len(self.different):,} of them different"
        share = f"{self.tokens:,} of all {tokens:,} {unit} ({self.tokens / max(1, tokens):.0%}) stand for them"
        most = f"{self.most_tokens:,} for one at the most; the largest has {width:,} x {height:,} pixels"
        parts = [
            f"{many}; {share}, {most}" if self.tokens else f"{many}; the largest has {width:,} x {height:,} pixels"
        ]
        for what, places in self.peculiar.items():
            more = ", ..." if len(places) > 3 else ""
            parts.append(f"{len(places):,} pictures {what} ({', '.join(places[:3])}{more})")
        return parts


def refuse_other_marks(mark: str, kind: str) -> RowProblem:
    """For what a model writes itself where a picture, film or sound stands."""
    way = "write <image> there, and name its file in a column `images`; or " if kind == "an image" else ""
    return RowProblem(
        f"a placeholder of {kind}: {mark} stands in it, with nothing that it stands for, so it would be learned as "
        f'text only: {way}leave such rows out, or set `replace: {{"{mark}": ""}}`'
    )
