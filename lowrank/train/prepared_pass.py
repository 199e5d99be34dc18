"""One forward and backward pass, made ready: what the engine runs, and what the memory planner watches it run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.batches import Batch
from lowrank.kernels.logprobs import Head, logprobs
from lowrank.models.base import Base


@dataclass(frozen=True)
class PreparedPass:
    """A micro-batch with everything about it that depends on values, so that the rest runs on tensors without any."""

    batch: Batch
    context: ForwardContext
    wanted: tuple[tuple[Head, torch.Tensor], ...]
    """(head, the K rows of the stream whose targets' log-probabilities it gives)."""
    tokens_of_step: int | None = None
    """Of all passes of the training step this one belongs to; None: it is the only one."""

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PreparedPass:
        """The same pass with other tensors: `move` of each."""
        wanted = tuple((head, move(index_K)) for head, index_K in self.wanted)
        return PreparedPass(self.batch.moved(move), self.context.moved(move), wanted, self.tokens_of_step)


class PassRecorder(Protocol):
    """Watches the phases of a training pass; each of them runs inside what its method returns."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """From token ids to the last hidden states."""
        ...

    def loss(self) -> contextlib.AbstractContextManager[object]:
        """From hidden states to one number."""
        ...

    def backward(self) -> contextlib.AbstractContextManager[object]:
        """All the way back."""
        ...


class Unrecorded:
    """Watches nothing."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """See PassRecorder."""
        return contextlib.nullcontext()

    loss = backward = forward


def heads_of(base: Base, bank: Bank, batch: Batch) -> list[tuple[Head, int, int]]:
    """(head, first token, end token): one entry for all neighbors that share the base's own head."""
    own = base.head()
    heads: list[tuple[Head, int, int]] = []
    for slot, first, end in batch.slot_ranges():
        head = bank.head(slot)
        plain = head.weight_VD is own.weight_VD and head.low_rank is None
        if plain and heads and heads[-1][0] is own:
            heads[-1] = (own, heads[-1][1], end)
        else:
            heads.append((own if plain else head, first, end))
    return heads


def wanted_logprobs(ready: PreparedPass, hidden_TD: torch.Tensor) -> list[torch.Tensor]:
    """log p of the targets that are wanted, (K) for each head; only those rows ever meet the vocabulary."""
    target_T = ready.batch.target_T
    return [logprobs(hidden_TD[index_K], target_T[index_K], head) for head, index_K in ready.wanted]


def all_logprobs(ready: PreparedPass, hidden_TD: torch.Tensor) -> torch.Tensor:
    """log p of every target that is wanted, (T), 0 elsewhere."""
    logprob_K = torch.cat(wanted_logprobs(ready, hidden_TD))
    index_K = torch.cat([index_K for _, index_K in ready.wanted])
    return logprob_K.new_zeros(ready.batch.num_tokens).index_put((index_K,), logprob_K)
