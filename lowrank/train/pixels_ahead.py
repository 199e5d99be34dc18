"""Pictures decoded and made ready for the tower while the model computes: in threads, a forward pass ahead.

Pixels are never kept for longer than a pass: one picture of 768 x 768 is 13 MB of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lowrank.batches import Batch, Media, Segment
from lowrank.models.base import Base

_MOST_THREADS = 8
DOCUMENTS_AHEAD = 8
"""Of the next step, whose first forward pass is not cut yet."""


class PixelsAhead:
    """The pixels of documents that will be asked for."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[Media, Future[dict[str, torch.Tensor]]] = {}

    def expect(self, batches: Sequence[Batch]) -> None:
        """These batches come next; what else was expected and not taken is forgotten."""
        wanted = [media for batch in batches for _, media in batch.media]
        for media in set(self._coming) - set(wanted):
            self._coming.pop(media).cancel()
        self._begin(wanted)

    def expect_step(self, segments: Iterable[Segment]) -> None:
        """The step after this one begins with these segments."""
        self._begin([each.media for each in segments if each.media is not None][:DOCUMENTS_AHEAD])

    def shown(self, batch: Batch) -> Batch:
        """The batch, on the host, with the pixels of its documents."""
        media_encoder = self._base.media_encoder
        if not batch.media or batch.pixels or media_encoder is None:
            return batch
        known = {
            index: coming.result()
            for index, media in batch.media
            if (coming := self._coming.pop(media, None)) is not None
        }
        return media_encoder.ready(batch, known)

    def _begin(self, wanted: Sequence[Media]) -> None:
        media_encoder = self._base.media_encoder
        if media_encoder is None or not wanted:
            return
        if self._threads is None:
            number = min(_MOST_THREADS, os.cpu_count() or 1)
            self._threads = ThreadPoolExecutor(number, thread_name_prefix="pictures")
        for media in wanted:
            if media not in self._coming:
                self._coming[media] = self._threads.submit(media_encoder.pixels, media)
