"""Rows with media where no model is named: their files are looked at and counted, their texts are rendered alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.chat.rendering import Renderer
from lowrank.data.formats.media import without_media
from lowrank.records import Medium, Record
from lowrank.segments import Media


class ModellessRenderer(Renderer):
    """A renderer that lets media of every kind pass. How many tokens stand for them only a model tells: here it is
    none."""

    def render_many(self, records: Iterable[Record]) -> Iterator[Rendering]:
        """One rendering per record, in order, whose segments have all of its media."""
        waiting: deque[tuple[Medium, ...]] = deque()

        def texts() -> Iterator[Record]:
            for record in records:
                text, media = without_media(record)
                waiting.append(media)
                yield text

        for rendering in super().render_many(texts()):
            yield beside(rendering, waiting.popleft())

    def takes(self, kind: str) -> bool:
        """Whoever will read them."""
        return True


def beside(rendering: Rendering, media: tuple[Medium, ...]) -> Rendering:
    """The rendering of a text with its media, for which no token stands."""
    if not media:
        return rendering
    shown = Media(media, ((0, 0),) * len(media))
    return replace(rendering, segments=tuple(replace(each, media=shown) for each in rendering.segments))
