"""The engine: four verbs over a bank of adapters. Everything that trains is a client of these.

    forward_backward(work)   gradients of one optimiser step of any number of jobs
    optim_step(slot)         clip, guard, update one job's parameters
    evaluate(work)           losses, no gradients
    (sampling is generate/, saving and loading are checkpoints/: both need only the base and the bank)

Jobs share nothing that is trained, so the gradient of the sum of their losses is each job's own. What
could tie them is kept per job: normalisation, clipping, finite check, optimiser state, random draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import Draws
from lowrank.kernels.logprobs import Head, logprobs
from lowrank.models.base import Base
from lowrank.objectives import Objective
from lowrank.records import BARE_BASE, Batch, Scores, Segment, Totals, number_the_step, pack
from lowrank.train.masters import Masters
from lowrank.train.optimizers import OptimizerConfig
from lowrank.train.out_of_memory import give_back_unused, in_plain_words, is_out_of_memory

_Result = TypeVar("_Result")
Work = Mapping[int, Sequence[Segment]]
"""The segments of each slot's optimiser step."""


@dataclass
class TrainedJob:
    """What the engine keeps for one job: what it trains, how, and how far it is."""

    objective: Objective
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: OptimizerConfig
    refresh: Callable[[], None]
    """Brings what computes up to date with `parameters`, after each update."""
    seed: int
    neftune_alpha: float = 0.0
    step: int = 0
    """Optimiser steps taken, skipped ones included."""
    loss_is_finite: bool = True
    """Of every forward pass since the last optimiser step."""


@dataclass(frozen=True)
class Forwarded:
    """What one job's step gave before the update."""

    loss: float
    tokens: int
    totals: Totals
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Updated:
    """What the update did. `skipped`: loss or gradient was not finite and nothing was changed."""

    grad_norm: float
    skipped: bool


class Engine:
    """Trains jobs by slot. A full-parameter job has the slot of the bare base."""

    def __init__(self, base: Base, bank: Bank, micro_batch_tokens: int) -> None:
        self.base = base
        self.bank = bank
        self.micro_batch_tokens = micro_batch_tokens
        self.notify: Callable[[str], None] = print
        """Hears what a person should know."""
        self.jobs: dict[int, TrainedJob] = {}

    def add(self, slot: int, objective: Objective, settings: OptimizerConfig, seed: int, neftune_alpha: float) -> None:
        """Train what is in `slot` (BARE_BASE: the base's own parameters)."""
        if slot == BARE_BASE:
            own = {name: value for name, value in self.base.model.named_parameters() if value.requires_grad}
            masters = Masters(own)
            parameters, refresh = masters.parameters, masters.refresh
        else:
            parameters, refresh = self.bank.parameters(slot), partial(self.bank.refresh, slot)
        if neftune_alpha:
            self.bank.enable_noise()
        optimizer = settings.build(parameters.values())
        self.jobs[slot] = TrainedJob(objective, parameters, optimizer, settings, refresh, seed, neftune_alpha)

    def remove(self, slot: int) -> None:
        """Forget a job's optimiser; its adapter stays in the bank."""
        del self.jobs[slot]

    def forward_backward(self, work: Work) -> dict[int, Forwarded]:
        """Accumulate the gradients of one optimiser step of every job in `work`.

        All jobs go through the base together, in as few passes as `micro_batch_tokens` allows; how the
        step is cut changes nothing but rounding. Where memory runs out, it is cut smaller and done again, with the same
        random draws.
        """
        clean = all(p.grad is None for slot in work for p in self.jobs[slot].parameters.values())
        return self._with_room(work, self._forward_backward, self._clear_gradients if clean else None)

    def _forward_backward(self, work: Work) -> dict[int, Forwarded]:
        batches = [batch.to(self.base.device) for batch in self.cut(work)]
        totals = {slot: self._count(slot, batches) for slot in work}
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in work}
        metrics: dict[int, dict[str, float]] = {slot: {} for slot in work}
        for batch in batches:
            logprob_T = self._logprobs(batch, train=True)
            shares = []
            for slot, part, scores in _by_slot(batch, logprob_T):
                share, extra = self.jobs[slot].objective.loss(scores, part, totals[slot])
                shares.append(share)
                losses[slot].append(share.detach())
                for name, value in extra.items():
                    metrics[slot][name] = metrics[slot].get(name, 0.0) + float(value)
            torch.stack(shares).sum().backward()
        forwarded = {}
        for slot in work:
            loss = float(torch.stack(losses[slot]).sum())
            self.jobs[slot].loss_is_finite &= math.isfinite(loss)
            forwarded[slot] = Forwarded(loss, sum(map(len, work[slot])), totals[slot], metrics[slot])
        return forwarded

    def optim_step(self, slot: int, learning_rate: float) -> Updated:
        """Update one job's parameters from its gradients, clipped to its own norm, and clear them.

        A loss or gradient that is not finite leaves parameters and optimiser state as they were.
        """
        job = self.jobs[slot]
        job.step += 1
        gradients = [parameter.grad for parameter in job.parameters.values() if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        finite, job.loss_is_finite = job.loss_is_finite and math.isfinite(norm), True
        if finite:
            limit = job.settings.max_grad_norm
            if limit is not None and norm > limit:
                torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]
            for group in job.optimizer.param_groups:
                group["lr"] = learning_rate
            job.optimizer.step()
            job.refresh()
        job.optimizer.zero_grad(set_to_none=True)
        return Updated(norm, skipped=not finite)

    @torch.no_grad()
    def evaluate(self, work: Work) -> dict[int, Forwarded]:
        """Losses of held-out segments, of any number of jobs in one pass, without dropout or noise."""
        return self._with_room(work, self._evaluate, lambda _: None)

    def _with_room(self, work: Work, run: Callable[[Work], _Result], undo: Callable[[Work], None] | None) -> _Result:
        """`run(work)`; where memory runs out, `undo` and again with forward passes of half the size."""
        while True:
            with in_plain_words("computing a forward pass that cannot be cut smaller"):
                try:
                    return run(work)
                except Exception as error:
                    batches = self.cut(work)
                    smallest = len(batches) == sum(len(_units(segments)) for segments in work.values())
                    if undo is None or smallest or not is_out_of_memory(error):
                        raise
            # only here the error is gone, and with it the frames that hold the tensors of the attempt
            undo(work)
            give_back_unused()
            largest = max(self.base.padded_tokens(batch.lengths) for batch in batches)
            self.micro_batch_tokens = max(1, min(largest, self.micro_batch_tokens) // 2)
            self.notify(
                f"out of memory in a forward pass of {largest} tokens: it is done again, and the run goes on, with "
                f"micro_batch_tokens: {self.micro_batch_tokens}; the results are the same"
            )

    def _clear_gradients(self, work: Work) -> None:
        for slot in work:
            self.jobs[slot].optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, work: Work) -> dict[int, Forwarded]:
        numbered = {slot: number_the_step(segments) for slot, segments in work.items()}
        batches = self.cut(numbered)
        totals = {slot: self._count(slot, batches) for slot in work}
        losses = dict.fromkeys(work, 0.0)
        for batch in batches:
            batch = batch.to(self.base.device)
            for slot, part, scores in _by_slot(batch, self._logprobs(batch, train=False)):
                losses[slot] += float(self.jobs[slot].objective.loss(scores, part, totals[slot])[0])
        return {slot: Forwarded(losses[slot], sum(map(len, work[slot])), totals[slot]) for slot in work}

    def cut(self, work: Work) -> list[Batch]:
        """Micro-batches of at most `micro_batch_tokens` tokens; pairs stay together, order within a slot is kept."""
        batches: list[list[tuple[int, Segment]]] = [[]]
        for slot in sorted(work):
            for unit in _units(work[slot]):
                lengths = tuple(len(segment) for _, segment in batches[-1]) + tuple(map(len, unit))
                fits = self.base.padded_tokens(lengths) <= self.micro_batch_tokens and self.base.may_share(lengths)
                if batches[-1] and not fits:
                    batches.append([])
                batches[-1] += [(slot, segment) for segment in unit]
        return [pack(entries) for entries in batches if entries]

    def _count(self, slot: int, batches: Sequence[Batch]) -> Totals:
        totals: Totals = {}
        for batch in batches:
            if slot in batch.slots:
                for name, value in self.jobs[slot].objective.count(batch.of_slot(slot)).items():
                    totals[name] = totals.get(name, 0.0) + value
        return totals

    def _logprobs(self, batch: Batch, train: bool) -> torch.Tensor:
        """log p of every target that counts, (T), 0 elsewhere; only those rows ever meet the vocabulary."""
        rows = self.base.rows(batch)
        draws = (
            {slot: Draws(job.seed, job.step, job.neftune_alpha) for slot, job in self.jobs.items()} if train else None
        )
        self.bank.routing.set(rows.num_rows, rows.ranges, rows.counter_N, rows.length_N, draws)
        hidden_TD = self.base.hidden(batch)
        pieces = []
        for head, first, end in self._heads(batch):
            index_K = batch.weight_T[first:end].nonzero()[:, 0] + first
            pieces.append((index_K, logprobs(hidden_TD[index_K], batch.target_T[index_K], head)))
        index_K = torch.cat([index for index, _ in pieces])
        logprob_K = torch.cat([logprob for _, logprob in pieces])
        return logprob_K.new_zeros(batch.num_tokens).index_put((index_K,), logprob_K)

    def _heads(self, batch: Batch) -> list[tuple[Head, int, int]]:
        """(head, first token, end token): one entry for all neighbours that share the base's own head."""
        own = self.base.head()
        heads: list[tuple[Head, int, int]] = []
        for slot, first, end in batch.slot_ranges():
            head = self.bank.head(slot)
            plain = head.weight_VD is own.weight_VD and head.low_rank is None
            if plain and heads and heads[-1][0] is own:
                heads[-1] = (own, heads[-1][1], end)
            else:
                heads.append((own if plain else head, first, end))
        return heads


def _by_slot(batch: Batch, logprob_T: torch.Tensor) -> list[tuple[int, Batch, Scores]]:
    return [
        (slot, batch.of_slot(slot), Scores(logprob_T=logprob_T[first:end])) for slot, first, end in batch.slot_ranges()
    ]


def _units(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments that must share a batch: the members of a pair, everything else alone."""
    units: list[list[Segment]] = []
    for segment in segments:
        if units and segment.pair >= 0 and units[-1][0].pair == segment.pair:
            units[-1].append(segment)
        else:
            units.append([segment])
    return units
