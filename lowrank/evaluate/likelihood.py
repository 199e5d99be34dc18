"""What adapters think of texts that are given: log-probabilities of the answers in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.evaluate.metrics import Metric
from lowrank.kernels.logprobs import logprobs
from lowrank.models.base import Base
from lowrank.records import Segment, pack


@torch.no_grad()
def label_logprobs(
    base: Base,
    bank: Bank,
    entries: Sequence[tuple[int, Segment]],
    *,
    micro_batch_tokens: int = 4096,
    on_done: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """(N, 2) for N `(slot, segment)`: the sum of log p over the tokens that carry weight, and how many they are.

    Any number of adapters in one pass. `on_done` hears how many entries are done.
    """
    found_N2 = np.zeros((len(entries), 2))
    done = 0
    for members in _cut(base, entries, micro_batch_tokens):
        batch = pack([entries[index] for index in members]).to(base.device)
        rows = base.rows(batch)
        bank.routing.set(rows.num_rows, rows.ranges)
        hidden_TD = base.hidden(batch)
        logprob_T = torch.zeros(batch.num_tokens, dtype=torch.float64, device=base.device)
        for slot, first, end in batch.slot_ranges():
            index_K = batch.weight_T[first:end].nonzero()[:, 0] + first
            logprob_T[index_K] = logprobs(hidden_TD[index_K], batch.target_T[index_K], bank.head(slot)).double()
        counts_T = (batch.weight_T > 0).double()
        for index, said, counted in zip(members, logprob_T.split(batch.lengths), counts_T.split(batch.lengths)):
            found_N2[index] = float(said.sum()), float(counted.sum())
        done += len(members)
        on_done(done)
    return found_N2


def perplexity(logprob_N2: np.ndarray) -> Metric:
    """exp of minus the mean log-probability of a token (Jelinek et al. 1977)."""
    return Metric(logprob_N2, lambda sums, rows: float(np.exp(-sums[0] / max(1.0, sums[1]))))


def _cut(base: Base, entries: Sequence[tuple[int, Segment]], most: int) -> Iterator[list[int]]:
    """Indices of batches, sorted by slot within a batch; entries of about one length together."""
    order = sorted(range(len(entries)), key=lambda index: len(entries[index][1]))
    batch: list[int] = []
    for index in order:
        lengths = tuple(len(entries[each][1]) for each in [*batch, index])
        if batch and (base.padded_tokens(lengths) > most or not base.may_share(lengths)):
            yield sorted(batch, key=lambda each: entries[each][0])
            batch = []
        batch.append(index)
    if batch:
        yield sorted(batch, key=lambda each: entries[each][0])
