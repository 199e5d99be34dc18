"""Pictures decoded and made ready for the tower while the model computes: in threads, a forward pass ahead.

A document's are decoded once, whatever number of jobs and answers of the step have them. Pixels are kept for no longer
than that: one picture of 768 x 768 is 13 MB of them.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lowrank.batches import Batch
from lowrank.models.base import Base
from lowrank.records import Medium
from lowrank.segments import Segment

_MOST_THREADS = 8
DOCUMENTS_AHEAD = 8
"""Of the next step, whose first forward pass is not cut yet."""

Items = tuple[Medium, ...]
"""All media of a document, which a processor looks at as a whole."""


class PixelsAhead:
    """The pixels of documents that will be asked for."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[Items, Future[dict[str, torch.Tensor]]] = {}
        self._batches: deque[Batch] = deque()
        self._left: Counter[Items] = Counter()
        """How many segments of the expected batches still want a document's."""
        self._following: list[Items] = []

    def expect(self, batches: Sequence[Batch], following: Iterable[Segment] | None = None) -> None:
        """These batches come next, in this order, and then a step that begins with `following`; None: with what was
        said last. What else was expected is forgotten."""
        self._batches = deque(batches)
        self._left = Counter(media.items for batch in batches for _, media in batch.media)
        if following is not None:
            coming = dict.fromkeys(each.media.items for each in following if each.media is not None)
            self._following = list(coming)[:DOCUMENTS_AHEAD]
        for items in self._coming.keys() - self._left.keys() - set(self._following):
            self._coming.pop(items).cancel()
        self._begin_first()

    def shown(self, batch: Batch) -> Batch:
        """The batch, on the host, with the pixels of its documents."""
        if self._batches and self._batches[0] is batch:
            self._batches.popleft()
            self._begin_first()
        media_encoder = self._base.media_encoder
        if not batch.media or batch.pixels or media_encoder is None:
            return batch
        return media_encoder.ready(batch, {media.items: self._taken(media.items) for _, media in batch.media})

    def _taken(self, items: Items) -> Mapping[str, torch.Tensor]:
        """The pixels of one document; they stay as long as other segments of the step want them."""
        coming = self._coming.get(items)
        self._left[items] -= 1
        if self._left[items] <= 0:
            self._coming.pop(items, None)
        media_encoder = self._base.media_encoder
        assert media_encoder is not None
        return coming.result() if coming is not None else media_encoder.pixels(items)

    def _begin_first(self) -> None:
        """Let threads begin with the batch that is next."""
        first = [media.items for _, media in self._batches[0].media] if self._batches else self._following
        media_encoder = self._base.media_encoder
        if media_encoder is None or not first:
            return
        if self._threads is None:
            number = min(_MOST_THREADS, os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(number, thread_name_prefix="pictures")
        for items in first:
            if items not in self._coming:
                self._coming[items] = self._threads.submit(media_encoder.pixels, items)
