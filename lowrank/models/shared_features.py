"""Features that are computed once in a step: what a tower that nobody adapts makes of a document's pictures, videos or
sounds is the same for every job, and for both answers of a pair.

They stay on the device as long as documents of the step still want them, and no longer.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from lowrank.batches import Batch
from lowrank.records import Medium
from lowrank.segments import Media

_Features = TypeVar("_Features")


class SharedFeatures:
    """Of the batches that are expected; everything else is computed each time."""

    def __init__(self) -> None:
        self._left: Counter[tuple[str, tuple[Medium, ...]]] = Counter()
        self._slots: Collection[int] = ()
        self._kept: dict[tuple[str, tuple[Medium, ...]], Any] = {}

    def expect(self, batches: Iterable[Batch], slots: Collection[int]) -> None:
        """These batches come next. `slots`: those whose features are the bare base's."""
        self._kept.clear()
        self._slots = slots
        self._left = Counter(
            (kind, media.items)
            for batch in batches
            for index, media in batch.media
            if batch.slots[index] in slots
            for kind in {each.kind for each in media.inside}
        )

    def keep(self, batches: Iterable[Batch], slots: Collection[int]) -> None:
        """These batches come again and again."""
        self.expect(batches, slots)
        self._left = Counter(dict.fromkeys(self._left, sys.maxsize))

    def of(self, kind: str, slot: int, media: Media, compute: Callable[[], _Features]) -> _Features:
        """What `compute` gives for media of this kind of a slot's document, or gave for another one with the same."""
        key = kind, media.items
        if slot not in self._slots or key not in self._left:
            return compute()
        features: _Features = self._kept.pop(key) if key in self._kept else compute()
        self._left[key] -= 1
        if self._left[key] > 0:
            self._kept[key] = features
        else:
            del self._left[key]
        return features
