"""Losses of single held-out rows, for confidence intervals and for paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Objective
from lowrank.train.step_metrics import read_scalars
from lowrank.train.trained_job import RowLosses


def row_losses(objective: Objective, scores: Scores, batch: Batch, totals: Totals) -> RowLosses:
    """Return the losses of the rows in one job's part of a batch; a pair is one row. `totals` are of all rows, so the
    sum of the terms is the loss of the batch."""
    loss_terms, counts, first = [], [], 0
    pairs = batch.pair_S.tolist()
    for last in range(1, len(pairs) + 1):
        if last < len(pairs) and pairs[last] >= 0 and pairs[last] == pairs[first]:
            continue
        row = batch.between(first, last)
        loss, _ = objective.loss(_between(scores, batch, first, last), row, totals)
        loss_terms.append(loss)
        counts.append(_count(objective, row))
        first = last
    return RowLosses(tuple(read_scalars(loss_terms)), tuple(counts))


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    """Return the losses of the rows of several batches, in their order."""
    return RowLosses(
        tuple(term for part in parts for term in part.loss_terms),
        tuple(count for part in parts for count in part.counts),
    )


def _count(objective: Objective, row: Batch) -> float:
    """Return what the mean loss is taken over: pairs where the objective counts them, else tokens."""
    counts = objective.count(row)
    return next((counts[name] for name in ("pairs", "tokens") if name in counts), 1.0)


def _between(scores: Scores, batch: Batch, first: int, last: int) -> Scores:
    begin, end = sum(batch.lengths[:first]), sum(batch.lengths[:last])
    cut = lambda value, low, high: None if value is None else value[low:high]  # noqa: E731
    return Scores(
        scores.logprob_T[begin:end],
        cut(scores.reference_T, begin, end),
        cut(scores.value_S, first, last),
        cut(scores.value_T, begin, end),
        cut(scores.score_T, begin, end),
    )
