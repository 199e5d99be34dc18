"""How the tokens of a batch lie in the rows that a linear layer sees, in the packed and in the padded layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from lowrank.batches import Batch


@dataclass(frozen=True)
class BatchRows:
    """How the tokens of a batch lie in the rows that a linear layer sees (N of them).

    `ranges`: `(slot, first row, end row)`; `counter_N`: the draw counter of each row (see `Segment.origin`);
    `length_N`: the length of the row's document.
    """

    num_rows: int
    ranges: tuple[tuple[int, int, int], ...]
    counter_N: torch.Tensor
    length_N: torch.Tensor


def packed_rows(batch: Batch) -> BatchRows:
    """One row for each token, and for each of the filler behind them."""
    length_S = batch.start_S1.diff()
    document_S = length_S
    if any(batch.prefixes):
        document_S = length_S + torch.tensor(batch.prefixes, device=length_S.device)
    origin_T, length_T = (
        each.repeat_interleave(length_S, dim=0, output_size=batch.num_tokens) for each in (batch.origin_S, document_S)
    )
    counter_N = F.pad(batch.position_T + origin_T, (0, batch.filler))
    length_N = F.pad(length_T, (0, batch.filler), value=1)
    return BatchRows(len(counter_N), tuple(batch.slot_ranges()), counter_N, length_N)


def padded_rows(batch: Batch) -> BatchRows:
    """For each segment as many rows as the longest has tokens."""
    longest = max(batch.lengths)
    place = torch.arange(longest, device=batch.token_T.device)
    counter_N = (batch.origin_S[:, None] + place[None, :]).reshape(-1)
    ranges: list[tuple[int, int, int]] = []
    for index, slot in enumerate(batch.slots):
        same = bool(ranges) and ranges[-1][0] == slot
        first = ranges.pop()[1] if same else index * longest
        ranges.append((slot, first, (index + 1) * longest))
    return BatchRows(len(counter_N), tuple(ranges), counter_N, batch.start_S1.diff().repeat_interleave(longest))
