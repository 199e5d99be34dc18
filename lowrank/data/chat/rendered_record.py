"""The result of rendering one record: its segments, or the reason why there are none."""

from __future__ import annotations

from dataclasses import dataclass

from lowrank.segments import Segment


@dataclass(frozen=True)
class Rendering:
    """What one record became."""

    segments: tuple[Segment, ...]
    """Empty when the record is dropped. The two answers of a preference share a `pair`; others stand alone."""
    problem: str | None = None
    """Why it was dropped, in plain words."""
    truncated_tokens: int = 0
    """Tokens cut off at the end of its segments."""
    refused: bool = False
    """The settings ask for an error here (`on_too_long: error`), not for a dropped record."""
    spelled: tuple[str, ...] = ()
    """Control tokens of the model that its texts spell, and that are read as text."""

    @property
    def samples(self) -> tuple[tuple[Segment, ...], ...]:
        """The segments as samples of a dataloader: a pair is one, and every other segment is one."""
        if not self.segments:
            return ()
        return (self.segments,) if self.segments[0].pair >= 0 else tuple((segment,) for segment in self.segments)
