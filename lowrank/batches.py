"""Tokenized segments and packed batches: what flows from rendering to the loss.

    Record (records.py) -> Segment -> Batch -> Scores

Letters in tensor names, everywhere in the package:

    T tokens of the packed batch     A adapters        D in-features     R rank
    S segments (one sequence each)   K scored tokens   O out-features    V vocabulary

A batch is one flat stream without padding. Segments are sorted by slot, so the tokens of one
adapter are contiguous and routing needs nothing but offsets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch

from lowrank.records import Medium, Prompted

BARE_BASE = -1
"""The slot of segments that see the frozen base and no adapter."""

PLAIN, CHOSEN, REJECTED, MISMATCHED = 0, 1, 2, 3
"""Values of `Segment.role` and `Batch.role_S`. A desirable answer is CHOSEN, an undesirable one REJECTED. MISMATCHED is
a prompt with another prompt's answer: nothing is learned from it, it is looked at before the step (KTO's estimate)."""


@dataclass(frozen=True)
class Media:
    """The pictures, videos and sounds of a segment.

    items     all of the document it is from, in order: a processor looks at a document as a whole
    spans     (first token, the one after the last) of what stands for each that is in the segment
    before    items of the document that come before those
    """

    items: tuple[Medium, ...]
    spans: tuple[tuple[int, int], ...]
    before: int = 0

    @property
    def inside(self) -> tuple[Medium, ...]:
        """Those that are in the segment."""
        return self.items[self.before : self.before + len(self.spans)]

    def between(self, first: int, end: int, shift: int = 0) -> Media | None:
        """Of the tokens [first, end), of which the first has place `shift` now; none is cut in two."""
        inside = [index for index, (start, stop) in enumerate(self.spans) if first <= start and stop <= end]
        if not inside:
            return None
        by = shift - first
        spans = tuple((self.spans[index][0] + by, self.spans[index][1] + by) for index in inside)
        return Media(self.items, spans, self.before + inside[0])

    def moved(self, number: int) -> Media:
        """Behind `number` more tokens."""
        return replace(self, spans=tuple((start + number, stop + number) for start, stop in self.spans))

    def whole_until(self, end: int) -> int:
        """The last place up to `end` at which a cut leaves every picture whole."""
        return next((start for start, stop in self.spans if start < end < stop), end)

    def before_pictures(self, place: int) -> int:
        """The last token up to `place` that is no part of a picture; -1 if there is none."""
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
    """Tokens of its job before it in the same optimizer step. Random draws (dropout, noise) count from
    here, so they do not depend on how the step is cut into batches or on what other jobs do."""
    reference_L: np.ndarray | None = None
    """float32: log-probability of `token_L[i]` under the bare base, 0 where `weight_L` is 0. For objectives that
    compare with where they began; attached before the step (train/reference.py)."""
    prompted: Prompted | None = None
    """What the tokens ask, of a segment that waits for an answer."""
    prefix: int = 0
    """Tokens of the last segment without a prefix that come before these: a prompt that both have
    (models/attention/prefix_sharing.py)."""
    signals_L: Mapping[str, np.ndarray] = field(default_factory=dict)
    """float32 numbers of each token, by name: what was found out about an answer the model gave itself (its advantage,
    its log-probability when it was drawn; train/rollouts.py)."""
    virtual: int = 0
    """Tokens at its beginning that are no words: trained vectors stand in their place (adapters/prompts.py)."""
    media: Media | None = None
    """The pictures, videos and sounds in it."""
    prompt: int | None = None
    """How many of its first tokens ask, which a prefix language model reads both ways; None: those before the first
    that carries weight."""

    def __len__(self) -> int:
        return len(self.token_L)

    @property
    def prompt_length(self) -> int:
        """`prompt`, found out where it is None."""
        if self.prompt is not None:
            return self.prompt
        learned_L = self.weight_L != 0
        return int(learned_L.argmax()) if learned_L.any() else len(self)


def unweighted(token_L: np.ndarray) -> Segment:
    """Text to be read, of which nothing is learned."""
    return Segment(token_L, np.zeros(len(token_L), np.float32))


def with_virtual_tokens(segment: Segment, number: int) -> Segment:
    """The segment behind `number` more tokens that carry no weight."""
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
    """The segments of one job's optimizer step, each knowing its `origin`."""
    numbered, origin = [], 0
    for segment in segments:
        numbered.append(replace(segment, origin=origin))
        origin += len(segment)
    return numbered


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. To a GPU by way of pinned memory, so that nobody waits for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Pixels:
    """What a model's towers are given for the media of one segment's document.

    tensors   by the names of the model's processor: `pixel_values`, `image_grid_thw`, `input_features` ...
    """

    segment: int
    media: Media
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Segments of any number of jobs as one flat stream.

    token_T     int64    the input
    target_T    int64    the token to predict at this place (the next of the same segment; 0 at its end)
    weight_T    float32  loss weight of that prediction; 0 is context
    position_T  int64    place within the document: within the segment, after its prefix
    start_S1    int32    where each segment starts, and T at the end (cumulative lengths)
    slot_S      int64    which adapter, ascending; -1 is the bare base
    pair_S      int64    which pair of the job's step it belongs to, -1 for none
    role_S      int64    PLAIN, CHOSEN, REJECTED or MISMATCHED
    origin_S    int64    see `Segment.origin`
    reference_T float32  log-probability of `target_T` under the bare base; None if no segment knows it
    signals_T   float32  by name, see `Segment.signals_L`; of the token that is predicted, 0 where a segment has none
    place_3T    int64    (3, T) places in time, height and width, where a model counts so and there are pictures
    """

    token_T: torch.Tensor
    target_T: torch.Tensor
    weight_T: torch.Tensor
    position_T: torch.Tensor
    start_S1: torch.Tensor
    slot_S: torch.Tensor
    pair_S: torch.Tensor
    role_S: torch.Tensor
    origin_S: torch.Tensor
    reference_T: torch.Tensor | None = None
    signals_T: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] = field(default=())
    """Segment lengths on the host, so that no step waits for the device to learn them."""
    slots: tuple[int, ...] = field(default=())
    """`slot_S` on the host."""
    virtual: tuple[int, ...] = field(default=())
    """`Segment.virtual` of each segment; empty where none has any."""
    prefixes: tuple[int, ...] = field(default=())
    """`Segment.prefix` of each."""
    prompts: tuple[int, ...] = field(default=())
    """Of each document, how many of its first tokens ask; see `Segment.prompt`."""
    filler: int = 0
    """Tokens of one more document behind the stream, of nobody's, whose hidden states are thrown away: where the number
    of rows matters (kernels/shape_bucketing.py)."""
    media: tuple[tuple[int, Media], ...] = field(default=())
    """(index of the segment, its media), of those that have some."""
    pixels: tuple[Pixels, ...] = field(default=())
    """Of each in `media`, once they are made (models/media_encoder.py)."""
    place_3T: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T: tokens of all segments together."""
        return sum(self.lengths)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Of the segments with their prefixes."""
        return tuple(length + prefix for length, prefix in zip(self.lengths, self.prefixes))

    @property
    def starts(self) -> list[int]:
        """Where each segment starts, and the number of tokens at the end, on the host."""
        return [0, *accumulate(self.lengths)]

    def slot_ranges(self) -> list[tuple[int, int, int]]:
        """`(slot, first token, end token)` of each slot that is present, in order."""
        ranges: list[tuple[int, int, int]] = []
        start = 0
        for slot, length in zip(self.slots, self.lengths):
            if ranges and ranges[-1][0] == slot:
                ranges[-1] = (slot, ranges[-1][1], start + length)
            else:
                ranges.append((slot, start, start + length))
            start += length
        return ranges

    def of_slot(self, slot: int) -> Batch:
        """The segments of one slot, as a batch of their own. Its tensors are views."""
        chosen = [index for index, other in enumerate(self.slots) if other == slot]
        assert chosen, f"slot {slot} is not in this batch"
        return self.between(chosen[0], chosen[-1] + 1)

    def between(self, first: int, last: int) -> Batch:
        """Segments `first` to `last`, the latter not among them, as a batch of their own. Its tensors are views."""
        begin = sum(self.lengths[:first])
        end = begin + sum(self.lengths[first:last])
        return Batch(
            token_T=self.token_T[begin:end],
            target_T=self.target_T[begin:end],
            weight_T=self.weight_T[begin:end],
            position_T=self.position_T[begin:end],
            start_S1=self.start_S1[first : last + 1] - begin,
            slot_S=self.slot_S[first:last],
            pair_S=self.pair_S[first:last],
            role_S=self.role_S[first:last],
            origin_S=self.origin_S[first:last],
            reference_T=None if self.reference_T is None else self.reference_T[begin:end],
            signals_T={name: value_T[begin:end] for name, value_T in self.signals_T.items()},
            lengths=self.lengths[first:last],
            slots=self.slots[first:last],
            virtual=self.virtual[first:last],
            prefixes=self.prefixes[first:last],
            prompts=self.prompts[first:last],
            media=tuple((index - first, each) for index, each in self.media if first <= index < last),
            pixels=tuple(
                replace(each, segment=each.segment - first) for each in self.pixels if first <= each.segment < last
            ),
            place_3T=None if self.place_3T is None else self.place_3T[:, begin:end],
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return self.moved(lambda tensor: to_device(tensor, device))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with other tensors: `move` of each."""
        moved = {name: move(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        signals_T = {name: move(value) for name, value in self.signals_T.items()}
        shown = {id(each.tensors): each.tensors for each in self.pixels}  # segments with the same media share theirs
        there = {key: {name: move(value) for name, value in own.items()} for key, own in shown.items()}
        pixels = tuple(replace(each, tensors=there[id(each.tensors)]) for each in self.pixels)
        return replace(self, **moved, signals_T=signals_T, pixels=pixels)


def pack(entries: Sequence[tuple[int, Segment]]) -> Batch:
    """One batch of `(slot, segment)` entries, sorted by slot; entries of one slot keep their order."""
    entries = sorted(entries, key=lambda entry: entry[0])
    slots = [slot for slot, _ in entries]
    segments = [segment for _, segment in entries]
    lengths = [len(segment) for segment in segments]
    token_T = torch.from_numpy(np.concatenate([segment.token_L for segment in segments]).astype(np.int64))
    weight_T = torch.from_numpy(np.concatenate([segment.weight_L for segment in segments]).astype(np.float32))
    start_S1 = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    # Shift once, here: the weight of a token becomes the weight of the prediction made one place before it.
    target_T, shifted_T = token_T.roll(-1), weight_T.roll(-1)
    ends = start_S1[1:].long() - 1
    target_T[ends], shifted_T[ends] = 0, 0.0
    return Batch(
        token_T=token_T,
        target_T=target_T,
        weight_T=shifted_T,
        position_T=torch.cat([torch.arange(each.prefix, each.prefix + len(each)) for each in segments]),
        start_S1=start_S1,
        slot_S=torch.tensor(slots),
        pair_S=torch.tensor([segment.pair for segment in segments]),
        role_S=torch.tensor([segment.role for segment in segments]),
        origin_S=torch.tensor([segment.origin for segment in segments]),
        reference_T=_of_tokens([segment.reference_L for segment in segments], lengths, ends),
        signals_T=_signals(segments, lengths, ends),
        lengths=tuple(lengths),
        slots=tuple(slots),
        virtual=tuple(segment.virtual for segment in segments) if any(each.virtual for each in segments) else (),
        prefixes=tuple(segment.prefix for segment in segments),
        prompts=tuple(segment.prefix + segment.prompt_length for segment in segments),
        media=tuple((index, segment.media) for index, segment in enumerate(segments) if segment.media is not None),
    )


def _signals(segments: Sequence[Segment], lengths: Sequence[int], end_S: torch.Tensor) -> dict[str, torch.Tensor]:
    names = sorted({name for segment in segments for name in segment.signals_L})
    found = {name: _of_tokens([each.signals_L.get(name) for each in segments], lengths, end_S) for name in names}
    return {name: value_T for name, value_T in found.items() if value_T is not None}


def _of_tokens(known: Sequence[np.ndarray | None], lengths: Sequence[int], end_S: torch.Tensor) -> torch.Tensor | None:
    """Numbers of each segment's tokens, shifted like the weights; 0 for segments that know none, None if all do not."""
    if all(value_L is None for value_L in known):
        return None
    whole = [np.zeros(length, np.float32) if value_L is None else value_L for value_L, length in zip(known, lengths)]
    value_T = torch.from_numpy(np.concatenate(whole).astype(np.float32)).roll(-1)
    value_T[end_S] = 0.0
    return value_T


@dataclass(frozen=True)
class Scores:
    """What the models said about a batch.

    logprob_T    float32  log-probability of `target_T`; 0 where `weight_T` is 0 (never computed there)
    reference_T  float32  the same under the bare base, for objectives that need "reference"
    value_S      float32  the value head on each segment's last token, for objectives that need "value"
    value_T      float32  the value head where each target is predicted, for objectives that need "token_values"
    score_T      float32  the objective's own score of each target, for objectives that need "token_scores"
    """

    logprob_T: torch.Tensor
    reference_T: torch.Tensor | None = None
    value_S: torch.Tensor | None = None
    value_T: torch.Tensor | None = None
    score_T: torch.Tensor | None = None


Totals = dict[str, float]
"""Counts summed over every micro-batch of a job's optimizer step, before the first forward."""
