"""Pixel prefetch: threads decode and preprocess pictures one forward pass ahead, while the model computes.

A document's pictures are decoded once, however many jobs and answers of the step have them. Pixels are kept for no
longer than that: one picture of 768 x 768 has 13 MB of them.
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
"""Documents of the next step that are prefetched, since its first micro-batch is not known yet."""

Items = tuple[Medium, ...]
"""All media of a document, which a processor reads as a whole."""


class PixelPrefetcher:
    """Decodes the pixels of documents before the batches that need them."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[Items, Future[dict[str, torch.Tensor]]] = {}
        self._batches: deque[Batch] = deque()
        self._left: Counter[Items] = Counter()
        """How many segments of the expected batches still need a document's pixels."""
        self._next_documents: list[Items] = []

    def expect(self, batches: Sequence[Batch], next_segments: Iterable[Segment] | None = None) -> None:
        """Announce the next batches, in this order, and the segments of the step after them; None: as announced last.
        Decoding of anything else is cancelled."""
        self._batches = deque(batches)
        self._left = Counter(media.items for batch in batches for _, media in batch.media)
        if next_segments is not None:
            coming = dict.fromkeys(each.media.items for each in next_segments if each.media is not None)
            self._next_documents = list(coming)[:DOCUMENTS_AHEAD]
        for items in self._coming.keys() - self._left.keys() - set(self._next_documents):
            self._coming.pop(items).cancel()
        self._begin_first()

    def with_pixels(self, batch: Batch) -> Batch:
        """Return the batch, on the host, with the pixels of its documents."""
        if self._batches and self._batches[0] is batch:
            self._batches.popleft()
            self._begin_first()
        media_encoder = self._base.media_encoder
        if not batch.media or batch.pixels or media_encoder is None:
            return batch
        return media_encoder.ready(batch, {media.items: self._pixels(media.items) for _, media in batch.media})

    def _pixels(self, items: Items) -> Mapping[str, torch.Tensor]:
        """Return the pixels of one document; they are kept while other segments of the step need them."""
        coming = self._coming.get(items)
        self._left[items] -= 1
        if self._left[items] <= 0:
            self._coming.pop(items, None)
        media_encoder = self._base.media_encoder
        assert media_encoder is not None
        return coming.result() if coming is not None else media_encoder.pixels(items)

    def _begin_first(self) -> None:
        """Start threads on the next batch."""
        first = [media.items for _, media in self._batches[0].media] if self._batches else self._next_documents
        media_encoder = self._base.media_encoder
        if media_encoder is None or not first:
            return
        if self._threads is None:
            number = min(_MOST_THREADS, os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(number, thread_name_prefix="pictures")
        for items in first:
            if items not in self._coming:
                self._coming[items] = self._threads.submit(media_encoder.pixels, items)
