"""A loss row by row: what each held-out row adds to it. For intervals over rows, and comparisons row for row."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.batches import Batch, Scores, Totals
from lowrank.objectives import Objective
from lowrank.train.step_metrics import read_scalars
from lowrank.train.trained_job import RowLosses


def row_losses(objective: Objective, scores: Scores, batch: Batch, totals: Totals) -> RowLosses:
    """Of the rows in one job's part of a batch; pairs are one row. `totals` are of all rows: cutting a batch changes no
    result, so the shares' sum is the loss of the batch."""
    shares, counts, first = [], [], 0
    pairs = batch.pair_S.tolist()
    for last in range(1, len(pairs) + 1):
        if last < len(pairs) and pairs[last] >= 0 and pairs[last] == pairs[first]:
            continue
        row = batch.between(first, last)
        share, _ = objective.loss(_between(scores, batch, first, last), row, totals)
        shares.append(share)
        counts.append(_count(objective, row))
        first = last
    return RowLosses(tuple(read_scalars(shares)), tuple(counts))


def joined(parts: Sequence[RowLosses]) -> RowLosses:
    """Of several batches, in their order."""
    return RowLosses(
        tuple(share for part in parts for share in part.shares), tuple(count for part in parts for count in part.counts)
    )


def _count(objective: Objective, row: Batch) -> float:
    """What a mean is over: pairs or answers where the objective counts them, else tokens."""
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
