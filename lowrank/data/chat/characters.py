"""Records as segments of characters, for looking at data without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from lowrank.data.chat.modelless import beside
from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.formats.media import without_media
from lowrank.data.formats.turns import pieces
from lowrank.records import Preference, Record
from lowrank.segments import CHOSEN, REJECTED, Segment

_CODE = "utf-32-le"


class CharacterRenderer:
    """Stands in for `Renderer`: one character is one token, and no chat template is applied."""

    notices: tuple[str, ...] = ()

    def render_many(self, records: Iterable[Record]) -> Iterator[Rendering]:
        """One rendering per record, never cut."""
        for record in records:
            text, media = without_media(record)
            yield beside(_rendering(text), media)

    def takes(self, kind: str) -> bool:
        """What the rows hold is looked at, whoever will read them."""
        return True

    def reads(self, field: str) -> bool:
        """No chat template, so no field of a turn is read."""
        return False

    def show(self, segment: Segment) -> list[tuple[str, float]]:
        """The segment as text in pieces of equal loss weight."""
        changes = np.flatnonzero(np.diff(segment.weight_L)) + 1
        parts = zip(np.split(segment.token_L, changes), np.split(segment.weight_L, changes))
        return [(part.astype("<u4").tobytes().decode(_CODE), float(weight[0])) for part, weight in parts if len(part)]


def _rendering(record: Record) -> Rendering:
    if not isinstance(record, Preference):
        return Rendering((_segment(pieces(record)),))
    answers = ((record.chosen, CHOSEN), (record.rejected, REJECTED))
    whole = [(replace(record.prompt, messages=(*record.prompt.messages, answer)), role) for answer, role in answers]
    return Rendering(tuple(replace(_segment(_last_only(pieces(chat))), pair=0, role=role) for chat, role in whole))


def _last_only(parts: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Only the last answer carries loss."""
    return [(text, 0.0) for text, _ in parts[:-1]] + parts[-1:]


def _segment(parts: list[tuple[str, float]]) -> Segment:
    text = "".join(text for text, _ in parts)
    weights = [np.full(len(text), weight, np.float32) for text, weight in parts]
    return Segment(np.frombuffer(text.encode(_CODE), "<u4"), np.concatenate(weights))
