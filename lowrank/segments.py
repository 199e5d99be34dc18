"""Segments: tokenized sequences with a loss weight per token, and the media in them.

    Record (records.py) -> Segment -> Batch (batches.py)

Letters in array names: L tokens of one segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lowrank.records import Medium, Prompted

PLAIN, CHOSEN, REJECTED, MISMATCHED = 0, 1, 2, 3
"""Values of `Segment.role` and `Batch.role_S`. A desirable answer is CHOSEN, an undesirable one REJECTED. MISMATCHED is
a prompt with another prompt's answer, which is scored before the step and not trained on (KTO's estimate of the KL)."""


@dataclass(frozen=True)
class Media:
    """The pictures, videos and sounds of a segment.

    items     all media of the segment's document, in order: a processor reads a document as a whole
    spans     (first token, end token) of the placeholder of each item that is in the segment
    before    number of items of the document before those
    """

    items: tuple[Medium, ...]
    spans: tuple[tuple[int, int], ...]
    before: int = 0

    @property
    def inside(self) -> tuple[Medium, ...]:
        """The items that are in the segment."""
        return self.items[self.before : self.before + len(self.spans)]

    def between(self, first: int, end: int, shift: int = 0) -> Media | None:
        """Return the media of the tokens [first, end), moved so that `first` is at `shift`; None if there are none. An
        item that the range would cut is left out."""
        inside = [index for index, (start, stop) in enumerate(self.spans) if first <= start and stop <= end]
        if not inside:
            return None
        by = shift - first
        spans = tuple((self.spans[index][0] + by, self.spans[index][1] + by) for index in inside)
        return Media(self.items, spans, self.before + inside[0])

    def moved(self, number: int) -> Media:
        """Return the media behind `number` more tokens."""
        return replace(self, spans=tuple((start + number, stop + number) for start, stop in self.spans))

    def whole_until(self, end: int) -> int:
        """Return the last position up to `end` at which a cut leaves every item whole."""
        return next((start for start, stop in self.spans if start < end < stop), end)

    def before_pictures(self, place: int) -> int:
        """Return the last token up to `place` that is not part of an item; -1 if there is none."""
        for start, stop in reversed(self.spans):
            place = start - 1 if start <= place < stop else place
        return place


@dataclass(frozen=True)
class Segment:
    """One tokenized sequence of L tokens.

    `weight_L[i]` is the loss weight of predicting `token_L[i]` from the tokens before it; 0 is
    context. `weight_L[0]` is always 0, since nothing comes before.
    """

    token_L: np.ndarray
    weight_L: np.ndarray
    pair: int = -1
    role: int = PLAIN
    origin: int = 0
    """Number of tokens of the job before it in the same optimizer step. Random numbers (dropout, noise) are counted
    from it, so they do not depend on micro-batches or on other jobs."""
    reference_L: np.ndarray | None = None
    """float32: log-probability of `token_L[i]` under the reference model, by default the bare base; 0 where `weight_L`
    is 0. For objectives that need it; attached before the step (train/reference.py)."""
    prompted: Prompted | None = None
    """The row of a prompt without an answer, which a rollout answers."""
    prefix: int = 0
    """Number of tokens before these that are shared with the last segment without a prefix: the prompt of both
    (models/attention/prefix_sharing.py)."""
    signals_L: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 numbers of each token, by name: the targets of a rollout, such as its advantage, or its log-probability
    when it was sampled (train/rollouts.py)."""
    virtual: int = 0
    """Number of virtual tokens at its beginning, which are replaced by trained vectors (adapters/prompts.py)."""
    media: Media | None = None
    """The pictures, videos and sounds in it."""
    prompt: int | None = None
    """Number of prompt tokens, to which a prefix language model attends in both directions; None: those before the
    first token that carries weight."""

    def __len__(self) -> int:
        return len(self.token_L)

    @property
    def prompt_length(self) -> int:
        """`prompt`, or where that is None, the number of tokens before the first that carries weight."""
        if self.prompt is not None:
            return self.prompt
        learned_L = self.weight_L != 0
        return int(learned_L.argmax()) if learned_L.any() else len(self)


def unweighted(token_L: np.ndarray) -> Segment:
    """Return a segment without loss."""
    return Segment(token_L, np.zeros(len(token_L), np.float32))


def with_virtual_tokens(segment: Segment, number: int) -> Segment:
    """Return the segment with `number` virtual tokens before it, which carry no weight."""
    if not number:
        return segment
    known_L = None if segment.reference_L is None else _behind(number, segment.reference_L)
    return replace(
        segment,
        token_L=_behind(number, segment.token_L),
        weight_L=_behind(number, segment.weight_L),
        reference_L=known_L,
        signals_L={name: _behind(number, value_L) for name, value_L in segment.signals_L.items()},
        virtual=segment.virtual + number,
        media=segment.media and segment.media.moved(number),
        prompt=None if segment.prompt is None else segment.prompt + number,
    )


def _behind(number: int, value_L: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(number, value_L.dtype), value_L])


def number_the_step(segments: Sequence[Segment]) -> list[Segment]:
    """Return the segments of one job's optimizer step with their `origin`."""
    numbered, origin = [], 0
    for segment in segments:
        numbered.append(replace(segment, origin=origin))
        origin += len(segment)
    return numbered
