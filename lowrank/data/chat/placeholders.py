"""What stands for a medium in a rendered conversation: the model's own processor says how many tokens, and which.

A chat template writes one placeholder for each picture and sound. Which characters are learned is known by then; they
move behind what the placeholders become. A placeholder that somebody typed is text (foreign.py) and stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lowrank.data.chat.loss_mask import Sample, Span
from lowrank.data.chat.template import RowRefused
from lowrank.errors import DataError, ModelError
from lowrank.records import KIND_NAMES, Audio, Conversation, Medium, Picture
from lowrank.segments import Media

_CUT = "are longer than the model's processor takes, which leaves their end out"


_OTHERWISE_SERVED = (
    "stand for another number of tokens than where the model's own processor is shown them as they are: "
    "model.image_max_pixels and image_min_pixels make them another size first; let what serves the model do so too, or "
    "set these to the pictures' own (docs/pictures.md)"
)


class Processor(Protocol):
    """A model's processor, as far as it is asked here (media/processor.py)."""

    def placeholder(self, kind: str) -> str:
        """What its chat template writes for a medium of this kind."""
        ...

    def placeholders(self, media: Sequence[Medium]) -> tuple[str, ...]:
        """What stands for each medium of a document."""
        ...

    def takes_whole(self, audio: Audio) -> bool:
        """Whether the end of a sound is among what stands for it."""
        ...

    def counts_as_served(self, picture: Picture) -> bool:
        """Whether as many tokens stand for a picture as without the limits of pixels here."""
        ...


def media_in(conversation: Conversation, num_messages: int | None = None) -> list[Medium]:
    """Of its first messages, in order."""
    return [medium for message in conversation.messages[:num_messages] for _, medium in message.media]


def put_in(sample: Sample, media: Sequence[Medium], processor: Processor | None) -> Sample:
    """The sample with what stands for its media in full. RowRefused where the template shows more or fewer placeholders
    than there are media, or the model's processor takes none of such a size."""
    if not media:
        return sample
    assert processor is not None, "rows with media are left out where nobody takes them"
    found, media = _matched(sample, media, processor)
    try:
        texts = processor.placeholders(media)
        for text, medium in zip(texts, media):
            if medium.kind == "audio" and processor.placeholder(medium.kind) not in text:
                raise ModelError(f"{medium.name} is too short: no token stands for it")
    except (ModelError, DataError) as error:
        kinds = " and ".join(KIND_NAMES[kind] for kind in dict.fromkeys(each.kind for each in media))
        raise RowRefused(f"the model's processor refuses its {kinds}: {error}") from error
    media = [_as_taken(each, processor) for each in media]
    moved = _mover(found, [len(text) for text in texts])
    parts, at = [], 0
    for (start, end), text in zip(found, texts):
        parts += [sample.text[at:start], text]
        at = end
    starts = [moved(start) for start, _ in found]
    return replace(
        sample,
        text="".join([*parts, sample.text[at:]]),
        learned=_all(sample.learned, moved),
        spelled=_all(sample.spelled, moved),
        places=tuple(((start, start + len(text)), each) for start, text, each in zip(starts, texts, media)),
    )


def _as_taken(medium: Medium, processor: Processor) -> Medium:
    """With what of it the processor leaves out, or takes otherwise than where it is served, among its notes."""
    if isinstance(medium, Audio) and not processor.takes_whole(medium):
        return replace(medium, notes=(*medium.notes, _CUT))
    if isinstance(medium, Picture) and not processor.counts_as_served(medium):
        return replace(medium, notes=(*medium.notes, _OTHERWISE_SERVED))
    return medium


def placeholder_names(media: Media | None) -> dict[Span, str]:
    """What a person reads in the place of the tokens of each medium, by their span."""
    if media is None:
        return {}
    return {span: f"[{each.shown}: {span[1] - span[0]:,} tokens]" for span, each in zip(media.spans, media.inside)}


def _matched(sample: Sample, media: Sequence[Medium], processor: Processor) -> tuple[list[Span], list[Medium]]:
    """The placeholders in the text, and the medium of each: those of a kind are in order, and a template may move one
    kind before another."""
    found: list[tuple[Span, Medium]] = []
    for kind in dict.fromkeys(each.kind for each in media):
        own = [each for each in media if each.kind == kind]
        placeholder = processor.placeholder(kind)
        spans = _found(sample, placeholder)
        if len(spans) != len(own):
            raise RowRefused(
                f"the chat template shows {len(spans)} places of {KIND_NAMES[kind]} ({placeholder}), and it has "
                f"{len(own)}: take the template that comes with the model (leave data.chat_template out)"
            )
        found += zip(spans, own)
    found.sort(key=lambda each: each[0])
    return [span for span, _ in found], [medium for _, medium in found]


def _found(sample: Sample, placeholder: str) -> list[Span]:
    typed = [start for start, end in sample.spelled if end > start]
    spans = [match.span() for match in re.finditer(re.escape(placeholder), sample.text)]
    return [span for span in spans if span[0] not in typed]


def _mover(found: Sequence[Span], lengths: Sequence[int]) -> Callable[[int], int]:
    """Where a character is, once each of the spans `found` has its new length."""
    ends = [end for _, end in found]
    added = [0]
    for (start, end), length in zip(found, lengths):
        added.append(added[-1] + length - (end - start))
    return lambda place: place + added[bisect_right(ends, place)]


def _all(spans: Sequence[Span], moved: Callable[[int], int]) -> Any:
    return tuple((moved(start), moved(end)) for start, end in spans)
