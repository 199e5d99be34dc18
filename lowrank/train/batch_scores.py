"""Scores of a batch that objectives need: log-probabilities, values, and token scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT, Batch, Scores
from lowrank.kernels.token_scores import token_scores
from lowrank.kernels.value_head import last_token_values, token_values
from lowrank.models.base import Base
from lowrank.objectives import ScoresTokens, needs
from lowrank.train.prepared_pass import PreparedPass, all_logprobs
from lowrank.train.trained_job import TrainedJob


class BatchScores:
    """Scores batches for the jobs of one engine. Reads the engine's job map; never modifies it."""

    def __init__(self, base: Base, bank: Bank, jobs: Mapping[int, TrainedJob]) -> None:
        self._base, self._bank, self._jobs = base, bank, jobs

    def targets(self, batch: Batch) -> torch.Tensor:
        """Return (T) bool: the targets whose log-probabilities are needed. Those that carry weight, except for jobs
        whose loss is computed from the value head or from token scores."""
        wanted_T = batch.weight_T != 0
        for slot, first, end in batch.slot_ranges():
            job = self._jobs[slot]
            of_value_head = job.value_D is not None and not needs(job.objective, "token_values")
            if of_value_head or needs(job.objective, "token_scores"):
                wanted_T[first:end] = False
        return wanted_T

    def of(
        self, ready: PreparedPass, hidden_TD: torch.Tensor, reference_base: Base | None
    ) -> list[tuple[int, Batch, Scores]]:
        """Return each job's part of a batch and its scores, from the last hidden states, (T, D). `reference_base`: see
        ScoringEngine; None: the base itself."""
        with self._base.placement.head():
            batch, logprob_T, scored = ready.batch, all_logprobs(ready, hidden_TD), []
        for slot, first, end in batch.slot_ranges():
            part, job = batch.of_slot(slot), self._jobs[slot]
            own_TD, value_S, value_T = hidden_TD[first:end], None, None
            if job.value_D is not None and needs(job.objective, "token_values"):
                value_T = token_values(own_TD, job.value_D)
            elif job.value_D is not None:
                value_S = last_token_values(own_TD, part.start_S1, job.value_D)
            score_T = (
                self._token_scores(slot, part, own_TD, reference_base) if needs(job.objective, "token_scores") else None
            )
            scored.append((slot, part, Scores(logprob_T[first:end], part.reference_T, value_S, value_T, score_T)))
        return scored

    def _token_scores(
        self, slot: int, part: Batch, hidden_TD: torch.Tensor, reference_base: Base | None
    ) -> torch.Tensor:
        """Return what the job's objective computes from each weighted token's distribution, (T), 0 elsewhere."""
        objective = self._jobs[slot].objective
        assert isinstance(objective, ScoresTokens), "it needs token_scores"
        index_K, reference = (part.weight_T != 0).nonzero()[:, 0], None
        if needs(objective, "reference_logits"):
            base = reference_base or self._base
            reference = (self._bare_hidden(base, part)[index_K], base.head())
        score_K = token_scores(
            hidden_TD[index_K], part.target_T[index_K], self._bank.head(slot), objective.score, reference
        )
        return score_K.new_zeros(part.num_tokens).index_put((index_K,), score_K)

    @torch.no_grad()
    def _bare_hidden(self, base: Base, part: Batch) -> torch.Tensor:
        """Return the last hidden states of a job's segments without its adapter, (T, D)."""
        bare = replace(part, slot_S=torch.full_like(part.slot_S, BASE_SLOT), slots=(BASE_SLOT,) * len(part.slots))
        if base is not self._base:
            return base.hidden(bare)
        with self._bank.routing.using(self._bank.context(bare, None)):
            return base.hidden(bare)
