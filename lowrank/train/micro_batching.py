"""Micro-batching (gradient accumulation): an optimizer step of any number of jobs, split into micro-batches that
fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowrank.adapters.bank import Bank
from lowrank.batches import Batch, pack
from lowrank.models.attention.prefix_sharing import tail_of
from lowrank.models.base import Base
from lowrank.segments import Segment

StepSegments = Mapping[int, Sequence[Segment]]
"""The segments of each slot's optimizer step."""


def split_into_micro_batches(
    base: Base, bank: Bank, work: StepSegments, micro_batch_tokens: int, share: bool
) -> list[Batch]:
    """Micro-batches of at most so many tokens; pairs stay together, order within a slot is kept.

    Here segments get their slot's virtual tokens. With `share`, answers to one prompt in one micro-batch share its
    computation.
    """
    filling = _Filling(base, micro_batch_tokens)
    batches = [filling.entries]
    for slot in sorted(work):
        whole: Segment | None = None
        for unit in units([bank.prompted(slot, segment) for segment in work[slot]]):
            entries = _entries(slot, unit, whole if share and filling.entries else None, share)
            if not filling.take(entries):
                filling = _Filling(base, micro_batch_tokens)
                batches.append(filling.entries)
                entries = _entries(slot, unit, None, share)
                filling.take(entries)
            whole = next((each for _, each in reversed(entries) if not each.prefix), whole)
    return [base.filled(pack(entries)) for entries in batches if entries]


class _Filling:
    """The micro-batch that is being filled. Of its lengths only what decides is kept, so that a step of n segments is
    split in n looks and not in n^2, in which a GPU has nothing to do."""

    def __init__(self, base: Base, most: int) -> None:
        self.entries: list[tuple[int, Segment]] = []
        self._base, self._most = base, most
        self._total = self._longest = 0
        self._documents: tuple[int, ...] = ()
        """The shortest and the longest."""

    def take(self, entries: Sequence[tuple[int, Segment]]) -> bool:
        """Add them, if they fit beside what is there; the first always do."""
        lengths = [len(segment) for _, segment in entries]
        documents = [*self._documents, *(segment.prefix + len(segment) for _, segment in entries)]
        total, longest = self._total + sum(lengths), max(self._longest, *lengths)
        extremes = (min(documents), max(documents))
        tokens = self._base.tokens_in_pass(len(self.entries) + len(entries), total, longest)
        if self.entries and (tokens > self._most or not self._base.may_share(extremes)):
            return False
        self.entries += entries
        self._total, self._longest, self._documents = total, longest, extremes
        return True


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
