"""Counting the media of one dataset: how many, how large a part of its tokens, and what is not taken as stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lowrank.data.formats.columns import RowProblem
from lowrank.records import KIND_NAMES, Audio, Medium, Picture, Video
from lowrank.segments import Media, Segment


@dataclass
class MediaCounts:
    """Counts of one kind in the usable rows."""

    kind: str
    number: int = 0
    rows: int = 0
    tokens: int = 0
    most_tokens: int = 0
    largest: Medium | None = None
    seconds: float = 0.0
    """Of all different sounds."""
    different: set[str] = field(default_factory=set)
    peculiar: dict[str, list[str]] = field(default_factory=dict)
    """Places of the rows, by what is peculiar about a medium of theirs."""

    def add(self, segments: Iterable[Segment], place: str) -> None:
        """One more row, as its segments."""
        media = [segment.media for segment in segments if segment.media is not None]
        of_kind = {each.digest: each for one in media for each in one.items if each.kind == self.kind}
        if not of_kind:
            return
        self.rows += 1
        for counts in map(self._counts, media):
            self.tokens += sum(counts)
            self.most_tokens = max(self.most_tokens, *counts, 0)
            self.number += len(counts)
        for medium in of_kind.values():
            if isinstance(medium, Audio) and medium.digest not in self.different:
                self.seconds += medium.seconds
            self.different.add(medium.digest)
            self.largest = medium if self.largest is None or _size(medium) > _size(self.largest) else self.largest
            for what in medium.notes:
                self.peculiar.setdefault(what, []).append(place)

    def sentences(self, tokens: int, unit: str) -> list[str]:
        """For a report; `tokens` are all of the dataset."""
        if not self.number or self.largest is None:
            return []
        names = KIND_NAMES[self.kind]
        many = f"{self.number:,} {names} in {self.rows:,} rows, {len(self.different):,} of them different"
        share = f"{self.tokens:,} of all {tokens:,} {unit} ({self.tokens / max(1, tokens):.0%}) stand for them"
        most = f"{self.most_tokens:,} for one at the most; {self._extent(self.largest)}"
        unknown = f"{self._extent(self.largest)}; how many tokens stand for them, a model with a tower tells (--model)"
        parts = [f"{many}; {share}, {most}" if self.tokens else f"{many}; {unknown}"]
        for what, places in self.peculiar.items():
            more = ", ..." if len(places) > 3 else ""
            parts.append(f"{len(places):,} {names} {what} ({', '.join(places[:3])}{more})")
        return parts

    def _counts(self, media: Media) -> list[int]:
        return [end - first for (first, end), each in zip(media.spans, media.inside) if each.kind == self.kind]

    def _extent(self, largest: Medium) -> str:
        if isinstance(largest, Picture):
            return f"the largest has {largest.width:,} x {largest.height:,} pixels"
        if isinstance(largest, Video):
            return f"the longest has {largest.frames:,} frames"
        return f"{self.seconds:,.0f} seconds in all, the longest has {largest.seconds:,.1f}"


def _size(medium: Medium) -> float:
    if isinstance(medium, Picture):
        return medium.width * medium.height
    return medium.frames if isinstance(medium, Video) else medium.seconds


_WRITTEN = {"an image": ("<image>", "images"), "a video": ("<video>", "videos"), "sound": ("<audio>", "audios")}
"""What stands in a text for one of a kind, and the column it is named in."""


def refuse_other_marks(mark: str, kind: str) -> RowProblem:
    """For what a model writes itself where a picture, film or sound stands."""
    place, column = _WRITTEN.get(kind, (None, None))
    way = f"write {place} there, and name its file in a column `{column}`; or " if place else ""
    return RowProblem(
        f"a placeholder of {kind}: {mark} stands in it, with nothing that it stands for, so it would be learned as "
        f'text only: {way}leave such rows out, or set `replace: {{"{mark}": ""}}`'
    )
