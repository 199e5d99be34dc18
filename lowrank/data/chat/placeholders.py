"""What stands for a picture in a rendered conversation: the model's own processor says how many tokens, and which.

A chat template writes one placeholder for each picture. Which characters are learned is known by then; they move
behind what the placeholders become. A placeholder that somebody typed is text (foreign.py) and stays as it is.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lowrank.batches import Media
from lowrank.data.chat.loss_mask import Sample, Span
from lowrank.data.chat.template import RowRefused
from lowrank.errors import ModelError
from lowrank.records import Conversation, Picture


class Sees(Protocol):
    """A model's processor, as far as it is asked here (media/processor.py)."""

    @property
    def placeholder(self) -> str:
        """What its chat template writes for a picture."""
        ...

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
        """What stands for each picture of a document, by their (width, height)."""
        ...


def pictures_in(conversation: Conversation, num_messages: int | None = None) -> list[Picture]:
    """Of its first messages, in order."""
    return [picture for message in conversation.messages[:num_messages] for _, picture in message.media]


def put_in(sample: Sample, pictures: Sequence[Picture], processor: Sees | None) -> Sample:
    """The sample with what stands for its pictures in full. RowRefused where the template shows more or fewer
    placeholders than there are pictures, or the model's processor takes none of such a size."""
    if not pictures:
        return sample
    assert processor is not None, "rows with pictures are left out where nobody sees them"
    found = _found(sample, processor.placeholder)
    if len(found) != len(pictures):
        raise RowRefused(
            f"the chat template shows {len(found)} places of pictures ({processor.placeholder}), and it has "
            f"{len(pictures)}: take the template that comes with the model (leave data.chat_template out)"
        )
    try:
        texts = processor.placeholders([(picture.width, picture.height) for picture in pictures])
    except ModelError as error:
        raise RowRefused(f"the model's processor refuses its pictures: {error}") from error
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
        places=tuple(((start, start + len(text)), each) for start, text, each in zip(starts, texts, pictures)),
    )


def placeholder_names(media: Media | None) -> dict[Span, str]:
    """What a person reads in the place of the tokens of each picture, by their span."""
    if media is None:
        return {}
    shown = media.pictures[media.before : media.before + len(media.spans)]
    return {
        span: f"[picture {each.width} x {each.height}: {span[1] - span[0]:,} tokens]"
        for span, each in zip(media.spans, shown)
    }


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
