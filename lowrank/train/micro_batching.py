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
    base: Base, bank: Bank, work: StepSegments, micro_batch_tokens: int, share_prefixes: bool
) -> list[Batch]:
    """Split a step into micro-batches of at most `micro_batch_tokens` tokens; pairs stay together, and order within a
    slot is kept. Segments get their slot's virtual tokens here. With `share_prefixes`, answers to one prompt in one
    micro-batch share its computation.
    """
    filling = _Filling(base, micro_batch_tokens)
    batches = [filling.entries]
    for slot in sorted(work):
        whole: Segment | None = None
        for unit in units([bank.with_virtual_tokens(slot, segment) for segment in work[slot]]):
            entries = _entries(slot, unit, whole if share_prefixes and filling.entries else None, share_prefixes)
            if not filling.add(entries):
                filling = _Filling(base, micro_batch_tokens)
                batches.append(filling.entries)
                entries = _entries(slot, unit, None, share_prefixes)
                filling.add(entries)
            whole = next((each for _, each in reversed(entries) if not each.prefix), whole)
    return [base.filled(pack(entries)) for entries in batches if entries]


class _Filling:
    """The micro-batch that is being filled. Of its lengths only sums and extremes are kept, so that splitting a step of
    n segments takes O(n) and not O(n^2) time, in which a GPU is idle."""

    def __init__(self, base: Base, most: int) -> None:
        self.entries: list[tuple[int, Segment]] = []
        self._base, self._most = base, most
        self._total = self._longest = 0
        self._documents: tuple[int, ...] = ()
        """The shortest and the longest document."""

    def add(self, entries: Sequence[tuple[int, Segment]]) -> bool:
        """Add entries if they fit; the first always do. Returns whether they were added."""
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


def _entries(
    slot: int, unit: Sequence[Segment], whole: Segment | None, share_prefixes: bool
) -> list[tuple[int, Segment]]:
    """Return the batch entries of a unit. With `share_prefixes`, a segment that follows a whole one (`whole`) with the
    same prompt leaves the prompt out."""
    entries: list[tuple[int, Segment]] = []
    for segment in unit:
        given = tail_of(segment, whole) if share_prefixes and whole is not None else segment
        whole = whole if given.prefix else given
        entries.append((slot, given))
    return entries


def units(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Return groups of segments that must be in one batch: the members of a pair together, every other one alone."""
    units: list[list[Segment]] = []
    for segment in segments:
        if units and segment.pair >= 0 and units[-1][0].pair == segment.pair:
            units[-1].append(segment)
        else:
            units.append([segment])
    return units
