"""Log-probabilities that adapters give to the answers in the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.batches import pack
from lowrank.devices import to_device
from lowrank.evaluate.metrics import Metric
from lowrank.kernels.accelerators import wide
from lowrank.kernels.logprobs import logprobs
from lowrank.kernels.precision import float32_or_wider
from lowrank.media.medium_files import BadMedium
from lowrank.models.base import Base
from lowrank.segments import Segment


@torch.no_grad()
def label_logprobs(
    base: Base,
    bank: Bank,
    entries: Sequence[tuple[int, Segment]],
    *,
    micro_batch_tokens: int = 4096,
    on_done: Callable[[int], None] = lambda done: None,
    on_broken: Callable[[int, BadMedium], None] | None = None,
) -> np.ndarray:
    """(N, 2) for N `(slot, segment)`: the sum of log p over the tokens that carry weight, and how many they are.

    Any number of adapters in one pass. `on_done` is called with how many entries are done, `on_broken` with the index
    of each whose media cannot be read, which is 0; without it BadMedium is raised.
    """
    found_N2 = np.zeros((len(entries), 2))
    done = 0
    entries = [(slot, bank.with_virtual_tokens(slot, segment)) for slot, segment in entries]

    def score(members: Sequence[int]) -> None:
        batch = base.filled(pack([entries[index] for index in members]))
        weights = batch.weight_T
        batch = batch.to(base.device)
        hidden_TD = bank.hidden(batch)
        logprob_T = wide(torch.zeros(batch.num_tokens, device=base.device))
        for slot, first, end in batch.slot_ranges():
            index_K = to_device(weights[first:end].nonzero()[:, 0] + first, base.device)
            logprob_T[index_K] = wide(logprobs(hidden_TD[index_K], batch.target_T[index_K], bank.head(slot)))
        sums = torch.stack([described.sum() for described in logprob_T.split(batch.lengths)]).tolist()
        for index, total, weight_L in zip(members, sums, weights.split(batch.lengths)):
            found_N2[index] = total, int((weight_L > 0).sum())

    for members in _cut(base, entries, micro_batch_tokens):
        try:
            score(members)
        except BadMedium:
            if on_broken is None:
                raise
            for index in members:
                try:
                    score([index])
                except BadMedium as error:
                    on_broken(index, error)
        done += len(members)
        on_done(done)
    return found_N2


@torch.no_grad()
def continuation_logprobs(
    base: Base,
    bank: Bank,
    entries: Sequence[tuple[int, Sequence[int], Sequence[int]]],
    *,
    micro_batch_tokens: int = 4096,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """For each `(slot, context, continuation)`: log p of the continuation, and whether greedy decoding would give it.

    What is read is the context and the continuation but for its last token; entries that read the same (answers of one
    token to one question) share a pass. `on_done` is called with how many entries are done.
    """
    readers: dict[tuple[int, tuple[int, ...], int], list[int]] = {}
    for index, (slot, context, continuation) in enumerate(entries):
        readers.setdefault((slot, (*context, *continuation[:-1]), len(context)), []).append(index)
    texts = [
        (
            slot,
            bank.with_virtual_tokens(
                slot, Segment(np.asarray(read, np.int64), np.zeros(len(read), np.float32), prompt=prompt)
            ),
        )
        for slot, read, prompt in readers
    ]
    members = list(readers.values())
    found: list[tuple[float, bool]] = [(0.0, False)] * len(entries)
    done = 0
    for chosen in _cut(base, texts, micro_batch_tokens):
        batch = base.filled(pack([texts[place] for place in chosen])).to(base.device)
        hidden_TD = bank.hidden(batch)
        end = 0
        for place in chosen:
            slot, segment = texts[place]
            end += len(segment)
            longest = max(len(entries[index][2]) for index in members[place])
            logprob_CV = _logprobs_of_all(base, bank, slot, hidden_TD[end - longest : end])
            for index in members[place]:
                target_C = torch.tensor(entries[index][2], device=base.device)
                own_CV = logprob_CV[len(logprob_CV) - len(target_C) :]
                described = wide(own_CV.gather(1, target_C[:, None])).sum()
                found[index] = float(described), bool((own_CV.argmax(-1) == target_C).all())
                done += 1
        on_done(done)
    return found


def _logprobs_of_all(base: Base, bank: Bank, slot: int, hidden_CD: torch.Tensor) -> torch.Tensor:
    """(C, V) float32 or wider, by the model's own head module, which the bank may have routed."""
    with bank.routing.using(ForwardContext(len(hidden_CD), ((slot, 0, len(hidden_CD)),))):
        logits_CV = base.head().finish(base.model.get_output_embeddings()(hidden_CD))
    return logits_CV.to(float32_or_wider(logits_CV.dtype)).log_softmax(-1)


def perplexity(logprob_N2: np.ndarray) -> Metric:
    """exp of minus the mean log-probability of a token (Jelinek et al. 1977)."""
    return Metric(logprob_N2, lambda sums, rows: float(np.exp(-sums[0] / max(1.0, sums[1]))))


def _cut(base: Base, entries: Sequence[tuple[int, Segment]], most: int) -> Iterator[list[int]]:
    """Indices of batches, sorted by slot within a batch; entries of about one length together."""
    order = sorted(range(len(entries)), key=lambda index: len(entries[index][1]))
    batch: list[int] = []
    total = shortest = 0
    for index in order:  # the longest comes last
        length = len(entries[index][1])
        tokens = base.tokens_in_pass(len(batch) + 1, total + length, length)
        if batch and (tokens > most or not base.may_share((shortest, length))):
            yield sorted(batch, key=lambda each: entries[each][0])
            batch, total = [], 0
        shortest = shortest if batch else length
        batch.append(index)
        total += length
    if batch:
        yield sorted(batch, key=lambda each: entries[each][0])
