"""Micro-batching (gradient accumulation): an optimizer step of any number of jobs, split into micro-batches that
fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank.adapters.bank import Bank
from lowrank.batches import Batch, Segment, pack
from lowrank.models.attention.prefix_sharing import tail_of
from lowrank.models.base import Base

StepSegments = Mapping[int, Sequence[Segment]]
"""The segments of each slot's optimizer step."""


def split_into_micro_batches(
    base: Base, bank: Bank, work: StepSegments, micro_batch_tokens: int, share: bool
) -> list[Batch]:
    """Micro-batches of at most so many tokens; pairs stay together, order within a slot is kept.

    Here segments get their slot's virtual tokens. With `share`, answers to one prompt in one micro-batch share its
    computation.
    """
    batches: list[list[tuple[int, Segment]]] = [[]]
    for slot in sorted(work):
        whole: Segment | None = None
        for unit in units([bank.prompted(slot, segment) for segment in work[slot]]):
            entries = _entries(slot, unit, whole if share and batches[-1] else None, share)
            if batches[-1] and not _fits(base, [*batches[-1], *entries], micro_batch_tokens):
                batches.append([])
                entries = _entries(slot, unit, None, share)
            batches[-1] += entries
            whole = next((each for _, each in reversed(entries) if not each.prefix), whole)
    return [base.filled(pack(entries)) for entries in batches if entries]


def _fits(base: Base, entries: Sequence[tuple[int, Segment]], micro_batch_tokens: int) -> bool:
    documents = tuple(segment.prefix + len(segment) for _, segment in entries)
    tokens = base.padded_tokens(tuple(len(segment) for _, segment in entries))
    return tokens <= micro_batch_tokens and base.may_share(documents)


def _entries(slot: int, unit: Sequence[Segment], whole: Segment | None, share: bool) -> list[tuple[int, Segment]]:
    """What goes into a batch; with `share`, what follows a whole segment with the same prompt does without it."""
    entries: list[tuple[int, Segment]] = []
    for segment in unit:
        given = tail_of(segment, whole) if share and whole is not None else segment
        whole = whole if given.prefix else given
        entries.append((slot, given))
    return entries


def units(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that must share a batch: the members of a pair, everything else alone."""
    units: list[list[Segment]] = []
    for segment in segments:
        if units and segment.pair >= 0 and units[-1][0].pair == segment.pair:
            units[-1].append(segment)
        else:
            units.append([segment])
    return units
