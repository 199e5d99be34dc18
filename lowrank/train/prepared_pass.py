"""A forward and backward pass with all inputs prepared, as the engine runs it and the memory planner simulates it."""

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
    """A micro-batch with all that depends on the values of its tensors, so that the pass itself runs on fake tensors
    too."""

    batch: Batch
    context: ForwardContext
    wanted: tuple[tuple[Head, torch.Tensor], ...]
    """`(head, indices (K) of the tokens whose targets' log-probabilities it computes)`."""
    tokens_of_step: int | None = None
    """Tokens of all passes of this training step; None: this is the only one."""

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> PreparedPass:
        """Return the pass with `move` applied to each tensor."""
        wanted = tuple((head, move(index_K)) for head, index_K in self.wanted)
        return PreparedPass(self.batch.moved(move), self.context.moved(move), wanted, self.tokens_of_step)


class PassRecorder(Protocol):
    """Records the phases of a training pass; each runs in the context that its method returns."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """From token ids to the last hidden states."""
        ...

    def loss(self) -> contextlib.AbstractContextManager[object]:
        """From hidden states to the loss."""
        ...

    def backward(self) -> contextlib.AbstractContextManager[object]:
        """From the loss to the gradients."""
        ...


class Unrecorded:
    """Records nothing."""

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """See PassRecorder."""
        return contextlib.nullcontext()

    loss = backward = forward


def heads_of(base: Base, bank: Bank, batch: Batch) -> list[tuple[Head, int, int]]:
    """Return `(head, first token, end token)`; neighboring slots that use the base's own head share one entry."""
    base_head = base.head()
    heads: list[tuple[Head, int, int]] = []
    for slot, first, end in batch.slot_ranges():
        head = bank.head(slot)
        plain = head.weight_VD is base_head.weight_VD and head.low_rank is None
        if plain and heads and heads[-1][0] is base_head:
            heads[-1] = (base_head, heads[-1][1], end)
        else:
            heads.append((base_head if plain else head, first, end))
    return heads


def wanted_logprobs(ready: PreparedPass, hidden_TD: torch.Tensor) -> list[torch.Tensor]:
    """Return the log-probabilities of the wanted targets, (K) for each head. Logits are computed for these rows
    only."""
    target_T = ready.batch.target_T
    return [logprobs(hidden_TD[index_K], target_T[index_K], head) for head, index_K in ready.wanted]


def all_logprobs(ready: PreparedPass, hidden_TD: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of every wanted target, (T), 0 elsewhere."""
    logprob_K = torch.cat(wanted_logprobs(ready, hidden_TD))
    index_K = torch.cat([index_K for _, index_K in ready.wanted])
    return logprob_K.new_zeros(ready.batch.num_tokens).index_put((index_K,), logprob_K)
