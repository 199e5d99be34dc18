"""Forward and backward passes through the base and its adapters, for training and scoring.

What a pass needs is prepared on the host, where numbers can be read without waiting, and then moved to the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import RngKey
from lowrank.batches import BASE_SLOT, Batch, pack
from lowrank.devices import to_device
from lowrank.models.base import Base
from lowrank.segments import Segment
from lowrank.train.pixel_prefetch import PixelPrefetcher
from lowrank.train.prepared_pass import PassRecorder, PreparedPass, Unrecorded, heads_of, wanted_logprobs
from lowrank.train.trained_job import TrainedJob


class Passes:
    """Runs passes for the jobs of one engine. Reads the engine's job map; never modifies it."""

    def __init__(self, base: Base, bank: Bank, jobs: Mapping[int, TrainedJob]) -> None:
        self._base, self._bank, self._jobs = base, bank, jobs
        self.prefetcher = PixelPrefetcher(base)

    def expect(self, batches: Sequence[Batch], next_segments: Sequence[Segment] | None = None) -> None:
        """Announce the next batches, in this order, so that their media are decoded ahead, once for all of them.
        `next_segments`: segments of the step after these, as far as they are known; None: as announced last."""
        self.prefetcher.expect(batches, next_segments)
        if self._base.media_encoder is not None:
            slots = {slot for batch in batches for slot in batch.slots}
            bare = {slot for slot in slots if slot == BASE_SLOT or not self._bank.slots[slot].adapts_tower}
            self._base.media_encoder.shared.expect(batches, bare)

    def ready(
        self,
        batch: Batch,
        train: bool = True,
        wanted_T: torch.Tensor | None = None,
        tokens_of_step: int | None = None,
    ) -> PreparedPass:
        """Return `prepare(batch)` with the pixels of its media, moved to the base's device."""
        batch = self.prefetcher.with_pixels(batch)
        prepared = replace(self.prepare(batch, train, wanted_T), tokens_of_step=tokens_of_step)
        return prepared.moved(partial(to_device, device=self._base.device))

    def prepare(self, batch: Batch, train: bool = True, wanted_T: torch.Tensor | None = None) -> PreparedPass:
        """Return what a forward pass over `batch` needs beside the model, on the host. `train`: with dropout and noise.

        `wanted_T`: (T) bool, the targets whose log-probabilities are needed; None: all that carry weight.
        """
        rng_keys = self.rng_keys() if train else None
        wanted_T = batch.weight_T != 0 if wanted_T is None else wanted_T
        wanted = tuple(
            (head, wanted_T[first:end].nonzero()[:, 0] + first)
            for head, first, end in heads_of(self._base, self._bank, batch)
        )
        return PreparedPass(batch, self._bank.context(batch, rng_keys), wanted)

    def rng_keys(self) -> dict[int, RngKey]:
        """Return the keys of the random numbers of each job's next training step, by slot."""
        return {slot: RngKey(job.seed, job.step, job.neftune_alpha) for slot, job in self._jobs.items()}

    def hidden(self, ready: PreparedPass) -> torch.Tensor:
        """Return the last hidden states, (T, D), each segment through its own slot, of a pass without backward."""
        with self._bank.routing.using(ready.context):
            return self._base.hidden(ready.batch)

    def train(
        self,
        ready: PreparedPass,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        updating: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        recorder: PassRecorder | None = None,
    ) -> None:
        """Run one forward and backward pass. `loss_of`: computes the loss from the last hidden states, (T, D);
        `updating`: makes the context of the backward pass, after the loss is computed."""
        recorder = recorder or Unrecorded()
        with self._bank.routing.using(ready.context):  # until the end: activation checkpointing reads it again
            with recorder.forward():
                hidden_TD = self._base.hidden(ready.batch, training=True, tokens_of_step=ready.tokens_of_step)
            with recorder.loss():
                total = loss_of(hidden_TD)
            del hidden_TD
            with updating(), recorder.backward():
                total.backward()

    def trace(self, ready: PreparedPass, recorder: PassRecorder) -> None:
        """Run one training pass on fake tensors while `recorder` measures it; gradients remain as in training.

        An objective may read values, which fake tensors do not have, so the loss is the sum of the log-probabilities.
        """

        def loss_of(hidden_TD: torch.Tensor) -> torch.Tensor:
            with self._base.placement.head():
                return torch.cat(wanted_logprobs(ready, hidden_TD)).sum()

        self.train(ready, loss_of, recorder=recorder)

    def idle(self, passes: int, *, train: bool = False, head: bool = True) -> None:
        """Run dummy passes of one token through the bare base, for the collectives that other ranks run in theirs.
        `head`: the other ranks' passes use the head."""
        token = Segment(np.zeros(1, np.int64), np.zeros(1, np.float32))
        for _ in range(passes):
            ready = self.ready(pack([(BASE_SLOT, token)]), train=False)
            with self._bank.routing.using(ready.context), torch.set_grad_enabled(train):
                hidden_TD = self._base.hidden(ready.batch, training=train)
                with self._base.placement.head() if head else contextlib.nullcontext():
                    pass
                if train:
                    hidden_TD.sum().backward()
