"""Calibration passes: steps of a job through the bare base, for adapters that are initialized from its activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from lowrank.adapters.calibration import CalibrationBatch
from lowrank.adapters.routing import ForwardContext
from lowrank.batches import BASE_SLOT, Batch
from lowrank.data.batching.dataloader import DataLoader
from lowrank.train.engine import Engine


def calibration_passes(engine: Engine, dataloader: DataLoader) -> Iterator[tuple[CalibrationBatch, ...]]:
    """Yield the steps of a copy of `dataloader` from its beginning, without end."""
    steps = dataloader.again()
    while True:
        batches = engine.micro_batches({BASE_SLOT: steps.next_step()})
        yield tuple(_calibration_batch(engine, replace(batch, filler=0).to(engine.base.device)) for batch in batches)


def _calibration_batch(engine: Engine, batch: Batch) -> CalibrationBatch:
    """Return one micro-batch for calibration. `weight_T` is aligned with predictions, one position before their token;
    here the tokens themselves count."""
    token_T = batch.weight_T.roll(1) != 0
    token_T[batch.start_S1[:-1].long()] = False
    if engine.base.layout == "packed":
        return CalibrationBatch(token_T, partial(_run, engine, batch))
    longest = max(batch.lengths)
    learned_SL = torch.zeros(len(batch.lengths), longest, dtype=torch.bool, device=token_T.device)
    segment_T = torch.arange(len(batch.lengths), device=token_T.device).repeat_interleave(batch.start_S1.diff())
    learned_SL[segment_T, batch.position_T] = token_T
    return CalibrationBatch(learned_SL.view(-1), partial(_run, engine, batch))


@torch.no_grad()
def _run(engine: Engine, batch: Batch) -> None:
    with engine.bank.routing.using(ForwardContext()):
        engine.base.hidden(batch)
