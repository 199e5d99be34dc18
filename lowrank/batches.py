"""Packed batches: the input of a pass through the model (Batch), and its result (Scores).

    Segment (segments.py) -> Batch -> Scores

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

from lowrank.devices import to_device
from lowrank.segments import Media, Segment

BASE_SLOT = -1
"""The slot of segments that go through the base without adapter."""


@dataclass(frozen=True)
class Pixels:
    """The tensors of one segment's media, as the model's towers take them.

    tensors   by the names of the model's processor: `pixel_values`, `image_grid_thw`, `input_features` ...
    """

    segment: int
    media: Media
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Segments of any number of jobs as one flat stream.

    token_T     int64    the input
    target_T    int64    the token to predict at this position (the next of the same segment; 0 at its end)
    weight_T    float32  loss weight of that prediction; 0 is context
    position_T  int64    position in the document: in the segment, after its prefix
    start_S1    int32    where each segment starts, and T at the end (cumulative lengths)
    slot_S      int64    the slot of the adapter, ascending; -1 is the base without adapter
    pair_S      int64    index of the segment's pair in the job's step, -1 for none
    role_S      int64    PLAIN, CHOSEN, REJECTED or MISMATCHED
    origin_S    int64    see `Segment.origin`
    reference_T float32  log-probability of `target_T` under the bare base; None if no segment has it
    signals_T   float32  by name, see `Segment.signals_L`; aligned with `target_T`, 0 where a segment has none
    mrope_position_3T    int64    (3, T) positions in time, height and width, for models with M-RoPE and pictures
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
    """Segment lengths on the host, so that no step waits for the device to read them."""
    slots: tuple[int, ...] = field(default=())
    """`slot_S` on the host."""
    virtual: tuple[int, ...] = field(default=())
    """`Segment.virtual` of each segment; empty where none has any."""
    prefixes: tuple[int, ...] = field(default=())
    """`Segment.prefix` of each."""
    prompts: tuple[int, ...] = field(default=())
    """Of each document, the number of prompt tokens; see `Segment.prompt`."""
    filler: int = 0
    """Padding tokens after the stream, as a document of no job whose hidden states are discarded, where the number of
    rows is bucketed (kernels/shape_bucketing.py)."""
    media: tuple[tuple[int, Media], ...] = field(default=())
    """`(index of the segment, its media)`, of segments that have media."""
    pixels: tuple[Pixels, ...] = field(default=())
    """Pixels of each entry of `media`, once they are computed (models/media_encoder.py)."""
    mrope_position_3T: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens of all segments."""
        return sum(self.lengths)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """Lengths of the segments with their prefixes."""
        return tuple(length + prefix for length, prefix in zip(self.lengths, self.prefixes))

    @property
    def starts(self) -> list[int]:
        """The start of each segment, then the number of tokens, on the host."""
        return [0, *accumulate(self.lengths)]

    def slot_ranges(self) -> list[tuple[int, int, int]]:
        """Return `(slot, first token, end token)` of each slot in the batch, in order."""
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
        """Return the segments of one slot as a batch, whose tensors are views."""
        chosen = [index for index, other in enumerate(self.slots) if other == slot]
        assert chosen, f"slot {slot} is not in this batch"
        return self.between(chosen[0], chosen[-1] + 1)

    def between(self, first: int, last: int) -> Batch:
        """Return segments `first` to `last` (exclusive) as a batch, whose tensors are views."""
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
            mrope_position_3T=None if self.mrope_position_3T is None else self.mrope_position_3T[:, begin:end],
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        return self.moved(lambda tensor: to_device(tensor, device))

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Return the batch with `move` applied to each tensor."""
        moved = {name: move(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        signals_T = {name: move(value) for name, value in self.signals_T.items()}
        distinct = {id(each.tensors): each.tensors for each in self.pixels}  # segments with the same media share them
        by_id = {key: {name: move(value) for name, value in tensors.items()} for key, tensors in distinct.items()}
        pixels = tuple(replace(each, tensors=by_id[id(each.tensors)]) for each in self.pixels)
        return replace(self, **moved, signals_T=signals_T, pixels=pixels)


def pack(entries: Sequence[tuple[int, Segment]]) -> Batch:
    """Return one batch of `(slot, segment)` entries, sorted by slot; entries of one slot keep their order."""
    entries = sorted(entries, key=lambda entry: entry[0])
    slots = [slot for slot, _ in entries]
    segments = [segment for _, segment in entries]
    lengths = [len(segment) for segment in segments]
    token_T = torch.from_numpy(np.concatenate([segment.token_L for segment in segments]).astype(np.int64))
    weight_T = torch.from_numpy(np.concatenate([segment.weight_L for segment in segments]).astype(np.float32))
    start_S1 = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    # Shift once, here: the weight of a token becomes the weight of its prediction, one position before it.
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
    """Return numbers of each segment's tokens, shifted like the weights; 0 for segments without them, None if all
    are."""
    if all(value_L is None for value_L in known):
        return None
    whole = [np.zeros(length, np.float32) if value_L is None else value_L for value_L, length in zip(known, lengths)]
    value_T = torch.from_numpy(np.concatenate(whole).astype(np.float32)).roll(-1)
    value_T[end_S] = 0.0
    return value_T


@dataclass(frozen=True)
class Scores:
    """The models' scores of a batch.

    logprob_T    float32  log-probability of `target_T`; 0 where `weight_T` is 0 (never computed there)
    reference_T  float32  the same under the bare base, for objectives that need "reference"
    value_S      float32  the value head on each segment's last token, for objectives that need "value"
    value_T      float32  the value head at each prediction, for objectives that need "token_values"
    score_T      float32  the objective's own score of each target, for objectives that need "token_scores"
    """

    logprob_T: torch.Tensor
    reference_T: torch.Tensor | None = None
    value_S: torch.Tensor | None = None
    value_T: torch.Tensor | None = None
    score_T: torch.Tensor | None = None


Totals = dict[str, float]
"""Counts by which losses are divided, summed over every micro-batch of a job's optimizer step before the first forward
pass."""
