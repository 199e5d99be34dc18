"""The engine: a few verbs over a bank of adapters. Everything that trains is a client of these.

    forward_backward(work)   gradients of one optimiser step of any number of jobs
    optim_step(slot)         clip, guard, update one job's parameters
    evaluate(work)           losses and the objectives' metrics, no gradients
    logprobs(slot, segments) what a slot thinks of given tokens
    (sampling is generate/, saving and loading are checkpoints/: both need only the base and the bank)

Jobs share nothing that is trained, so the gradient of the sum of their losses is each job's own. What
could tie them is kept per job: normalisation, clipping, finite check, optimiser state, random draws.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import Draws
from lowrank.errors import ModelError
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.host_memory import Heap
from lowrank.kernels.logprobs import Head, logprobs
from lowrank.kernels.values import last_token_values, token_values
from lowrank.models.base import Base
from lowrank.objectives import Metrics, Objective, needs
from lowrank.records import BARE_BASE, MISMATCHED, Batch, Scores, Segment, Totals, number_the_step
from lowrank.train.cut import Work, cut, units
from lowrank.train.decay import undecayed
from lowrank.train.layerwise import LayerwiseUpdates
from lowrank.train.loss_scale import LossScale, scale_for
from lowrank.train.masters import Masters
from lowrank.train.optimizers import OptimizerConfig, set_learning_rate
from lowrank.train.out_of_memory import give_back_unused, in_plain_words, is_out_of_memory

_Result = TypeVar("_Result")
VALUE_HEAD = "value_head"
"""The name of a job's value head among its parameters."""


_LARGE_PASS = 1024
"""Tokens. To give memory back and take it again costs about half a second for each GB: a sixth of a step of passes of
256 tokens, where it saves a fifteenth of the memory, and a twentieth of one of 4,096, where it saves a third."""


@dataclass
class TrainedJob:
    """What the engine keeps for one job: what it trains, how, and how far it is."""

    objective: Objective
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: OptimizerConfig
    refresh: Callable[[], None]
    """Brings what computes up to date with `parameters`, after each update."""
    num_steps: int | None
    """Optimiser steps it will take; None: not known, and adapters with a schedule of their own stay as they are."""
    seed: int
    neftune_alpha: float = 0.0
    value_D: torch.nn.Parameter | None = None
    """The value head, for an objective that needs one; also among `parameters`."""
    scale: LossScale | None = None
    """What its losses are multiplied by in the backward pass, where gradients would underflow."""
    layerwise: LayerwiseUpdates | None = None
    """Where updates happen within the backward pass."""
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
    """What the update did. `skipped`: loss or gradient was not finite and nothing was changed (a gradient under
    `layerwise`: its own parameter was not)."""

    grad_norm: float
    skipped: bool
    loss_scale: float | None = None
    """It was skipped because scaled float16 gradients overflowed; the scale from now on."""


class Engine:
    """Trains jobs by slot. A full-parameter job has the slot of the bare base."""

    def __init__(self, base: Base, bank: Bank, micro_batch_tokens: int) -> None:
        self.base = base
        self.bank = bank
        self.micro_batch_tokens = micro_batch_tokens
        self.notify: Callable[[str], None] = print
        """Hears what a person should know."""
        self.jobs: dict[int, TrainedJob] = {}
        self._heap = Heap()

    def add(
        self,
        slot: int,
        objective: Objective,
        settings: OptimizerConfig,
        seed: int,
        neftune_alpha: float,
        num_steps: int | None = None,
    ) -> None:
        """Train what is in `slot` (BARE_BASE: the base's own parameters). `num_steps`: see TrainedJob."""
        masters, own = None, {}
        if slot == BARE_BASE:
            own = {name: value for name, value in self.base.model.named_parameters() if value.requires_grad}
            masters = Masters(own, settings.trains_in_parts)
            parameters, refresh, factors = masters.parameters, masters.refresh, None
        else:
            parameters, refresh = self.bank.parameters(slot), partial(self.bank.refresh, slot)
            factors = self.bank.learning_rate_factors(slot, settings.learning_rate)
        if neftune_alpha:
            self.bank.enable_noise()
        with_head = needs(objective, "value") or needs(objective, "token_values")
        value_D = self._fresh_value_head(seed) if with_head else None
        if value_D is not None:
            parameters = {**parameters, VALUE_HEAD: value_D}
            factors = factors and [*factors, 1.0]
        optimizer = settings.build(parameters, factors, undecayed(parameters, self.base.model), self.base.head_dim)
        if masters is not None and settings.trains_in_parts:
            getattr(optimizer, "follow")(masters.train)  # noqa: B009 (only such have it)
        for note in settings.notes(self.base.device):
            self.notify(note)
        scale, layerwise = scale_for(self.base.dtype), None
        if masters is not None and settings.layerwise:
            if scale is not None:
                raise ModelError(
                    "optimizer.layerwise: float16 gradients are scaled until the whole step is known to be finite; set "
                    "model.dtype: bfloat16, or leave layerwise out"
                )
            receiving = own if value_D is None else {**own, VALUE_HEAD: value_D}
            layerwise = LayerwiseUpdates(receiving, parameters, optimizer, masters.write_back)
        self.jobs[slot] = TrainedJob(
            objective,
            parameters,
            optimizer,
            settings,
            refresh,
            num_steps,
            seed,
            neftune_alpha,
            value_D,
            scale,
            layerwise,
        )

    def remove(self, slot: int) -> None:
        """Forget a job's optimiser; its adapter stays in the bank."""
        job = self.jobs.pop(slot)
        if job.layerwise is not None:
            job.layerwise.close()

    @torch.no_grad()
    def load_value_head(self, slot: int, value_D: torch.Tensor | None) -> None:
        """Put a saved value head in the place of a job's fresh one. ModelError if it does not fit."""
        own_D = self.jobs[slot].value_D
        assert own_D is not None, f"the job in slot {slot} has no value head"
        if value_D is None or value_D.shape != own_D.shape:
            found = "none" if value_D is None else f"{len(value_D)} numbers"
            raise ModelError(f"the value head has {len(own_D)} numbers, in the saved job there is {found}")
        own_D.copy_(value_D)

    def forward_backward(self, work: Work, learning_rates: Mapping[int, float] | None = None) -> dict[int, Forwarded]:
        """Accumulate the gradients of one optimiser step of every job in `work`.

        All jobs go through the base together, in as few passes as `micro_batch_tokens` allows; how the
        step is cut changes nothing but rounding. Where memory runs out, it is cut smaller and done again, with the same
        random draws. A job whose optimiser is `layerwise` is updated here, if `learning_rates` has its rate.
        """
        clean = all(p.grad is None for slot in work for p in self.jobs[slot].parameters.values())
        layerwise = self._begin_layerwise(work, learning_rates or {})

        def undo(work: Work) -> None:
            if layerwise is not None and layerwise.updated:
                raise ModelError(
                    "memory ran out within the updates of optimizer.layerwise, so the step cannot be done again: lower "
                    "micro_batch_tokens and go on from the last checkpoint (resume: true)"
                )
            self._clear_gradients(work)

        run = partial(self._forward_backward, layerwise=layerwise)
        return self._with_room(work, run, undo if clean else None)

    def _begin_layerwise(self, work: Work, learning_rates: Mapping[int, float]) -> LayerwiseUpdates | None:
        """What updates the base within this step's backward pass, if anything does."""
        job = self.jobs[BARE_BASE] if BARE_BASE in work else None
        if job is None or job.layerwise is None:
            return None
        job.layerwise.begin()
        if BARE_BASE not in learning_rates:
            return None
        set_learning_rate(job.optimizer, learning_rates[BARE_BASE])
        return job.layerwise

    def _forward_backward(self, work: Work, layerwise: LayerwiseUpdates | None = None) -> dict[int, Forwarded]:
        batches = [batch.to(self.base.device) for batch in self.cut(_learned(work))]
        totals = self._totals(work, batches)
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in work}
        metrics: dict[int, Metrics] = {slot: {} for slot in work}
        if self.base.depths is not None:
            self.base.depths.tokens_of_step = sum(batch.num_tokens for batch in batches)
        for number, batch in enumerate(batches):
            if number and sum(batch.lengths) >= _LARGE_PASS:
                self._heap.trim()  # gradients lie between what the last pass left, and this one finds no place in it
            shares = []
            for slot, part, scores in self._score(batch, train=True):
                share, extra = self.jobs[slot].objective.loss(scores, part, totals[slot])
                scale = self.jobs[slot].scale
                shares.append(share if scale is None else share * scale.value)
                losses[slot].append(share.detach())
                _add(metrics[slot], extra)
            updates = layerwise is not None and number == len(batches) - 1 and math.isfinite(sum(losses[BARE_BASE]))
            with layerwise.updating() if layerwise is not None and updates else contextlib.nullcontext():
                torch.stack(shares).sum().backward()
        for slot in work:
            self._add_penalty(slot, metrics[slot])
        forwarded = {}
        for slot in work:
            loss = float(torch.stack(losses[slot]).sum())
            self.jobs[slot].loss_is_finite &= math.isfinite(loss)
            forwarded[slot] = Forwarded(loss, sum(map(len, work[slot])), totals[slot], _floats(metrics[slot]))
        return forwarded

    def _add_penalty(self, slot: int, metrics: Metrics) -> None:
        """The gradient of what an adapter itself wants small, which is no part of the loss that is reported."""
        penalty = None if slot == BARE_BASE else self.bank.penalty(slot)
        if penalty is not None:
            scale = self.jobs[slot].scale
            (penalty if scale is None else penalty * scale.value).backward()
            metrics["penalty"] = penalty.detach()

    def optim_step(self, slot: int, learning_rate: float) -> Updated:
        """Update one job's parameters from its gradients, clipped to its own norm, and clear them.

        A loss or gradient that is not finite leaves parameters and optimiser state as they were; a gradient under
        `layerwise`, its own parameter's only.
        """
        job = self.jobs[slot]
        job.step += 1
        gradients = [parameter.grad for parameter in job.parameters.values() if parameter.grad is not None]
        if job.scale is not None and gradients:
            torch._foreach_mul_(gradients, 1.0 / job.scale.value)  # pyright: ignore[reportPrivateImportUsage]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        if job.layerwise is not None:  # most of it was updated in the backward pass, and its gradients are gone
            norm = math.sqrt(norm**2 + job.layerwise.square) if job.layerwise.finite else math.inf
        overflow = job.scale is not None and job.loss_is_finite and not math.isfinite(norm) and job.scale.shrink()
        finite, job.loss_is_finite = job.loss_is_finite and math.isfinite(norm), True
        if finite:
            if job.scale is not None:
                job.scale.grow()
            limit = job.settings.max_grad_norm
            if limit is not None and norm > limit:
                torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage]
            set_learning_rate(job.optimizer, learning_rate)
            job.optimizer.step()
            if slot != BARE_BASE and job.num_steps is not None:
                self.bank.after_update(slot, job.step, job.num_steps)
            job.refresh()
        job.optimizer.zero_grad(set_to_none=True)
        return Updated(norm, not finite, job.scale.value if overflow and job.scale else None)

    @contextlib.contextmanager
    def settled(self, slots: Iterable[int]) -> Iterator[None]:
        """Jobs as they are evaluated and kept: an optimiser that averages its steps puts the average in place, and
        afterwards everything is as before, to the bit."""
        averaging = [job for slot in slots if (job := self.jobs.get(slot)) and hasattr(job.optimizer, "eval")]
        before = [{name: value.detach().clone() for name, value in job.parameters.items()} for job in averaging]
        for job in averaging:
            getattr(job.optimizer, "eval")()  # noqa: B009 (only some have it)
            job.refresh()
        try:
            yield
        finally:
            for job, values in zip(averaging, before):
                getattr(job.optimizer, "train")()  # noqa: B009
                for name, parameter in job.parameters.items():
                    parameter.detach().copy_(values[name])
                job.refresh()

    @torch.no_grad()
    def evaluate(self, work: Work) -> dict[int, Forwarded]:
        """Losses and metrics of held-out segments, of any number of jobs in one pass, without dropout or noise."""
        with self.settled(work):
            return self._with_room(work, self._evaluate, lambda _: None)

    def _with_room(self, work: Work, run: Callable[[Work], _Result], undo: Callable[[Work], None] | None) -> _Result:
        """`run(work)`; where memory runs out, `undo` and again with forward passes of half the size."""
        while True:
            with in_plain_words("computing a forward pass that cannot be cut smaller"):
                try:
                    return run(work)
                except Exception as error:
                    batches = self.cut(work)
                    smallest = len(batches) == sum(len(units(segments)) for segments in work.values())
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
        batches = self.cut(_learned(numbered))
        totals = self._totals(numbered, batches)
        losses = dict.fromkeys(work, 0.0)
        metrics: dict[int, Metrics] = {slot: {} for slot in work}
        for batch in batches:
            for slot, part, scores in self._score(batch.to(self.base.device), train=False):
                share, extra = self.jobs[slot].objective.loss(scores, part, totals[slot])
                losses[slot] += float(share)
                _add(metrics[slot], extra)
        return {
            slot: Forwarded(losses[slot], sum(map(len, work[slot])), totals[slot], _floats(metrics[slot]))
            for slot in work
        }

    @torch.no_grad()
    def logprobs(self, slot: int, segments: Sequence[Segment]) -> list[np.ndarray]:
        """log p of each segment's tokens as a slot sees them (-1: the bare base), without dropout or noise.

        (L) float32 each, 0 where the token carries no weight.
        """
        found: list[np.ndarray] = []
        virtual = self.bank.num_virtual(slot)
        for batch in self.cut({slot: segments}):
            batch = batch.to(self.base.device)
            logprob_T = self._logprobs(batch, self._hidden(batch, train=False), batch.weight_T != 0).float().cpu()
            for piece_L, prefix in zip(logprob_T.split(batch.lengths), batch.prefixes):
                known_L = piece_L.roll(1).numpy()  # the last prediction of a segment is of nothing, and 0
                found.append(np.concatenate([np.zeros(prefix, np.float32), known_L])[virtual:])
        return found

    @torch.no_grad()
    def values(self, slot: int, segments: Sequence[Segment], value_D: torch.Tensor | None = None) -> list[np.ndarray]:
        """What a value head (None: the job's own) gives for each token of each segment, (L) float32 each."""
        head_D = self.jobs[slot].value_D if value_D is None else value_D.to(self.base.device)
        assert head_D is not None, f"the job in slot {slot} has no value head"
        found: list[np.ndarray] = []
        virtual = self.bank.num_virtual(slot)
        for batch in self.cut({slot: segments}, share=False):
            batch = batch.to(self.base.device)
            value_T = token_values(self._hidden(batch, train=False), head_D).float().cpu()
            found += [piece_L[virtual:].numpy() for piece_L in value_T.split(batch.lengths)]
        return found

    def cut(self, work: Work, share: bool = True) -> list[Batch]:
        """Micro-batches of at most `micro_batch_tokens` tokens (cut.py). Where the base can, answers to one prompt in
        one micro-batch `share` its computation."""
        share = share and self.base.shares_prompts
        return cut(self.base, self.bank, work, self.micro_batch_tokens, share)

    def _totals(self, work: Work, batches: Sequence[Batch]) -> dict[int, Totals]:
        """What the losses of a step divide by: counted, and for objectives that ask for it, observed."""
        totals: dict[int, Totals] = {slot: {} for slot in work}
        for batch in batches:
            for slot, _, _ in batch.slot_ranges():
                _sum_up(totals[slot], self.jobs[slot].objective.count(batch.of_slot(slot)))
        observed = {slot: [each for each in work[slot] if each.role == MISMATCHED] for slot in work}
        with torch.no_grad():
            for batch in self.cut(observed):
                for slot, part, scores in self._score(batch.to(self.base.device), train=False):
                    observe = getattr(self.jobs[slot].objective, "observe")  # noqa: B009 (only some have it)
                    _sum_up(totals[slot], observe(scores, part))
        return totals

    def _score(self, batch: Batch, train: bool) -> list[tuple[int, Batch, Scores]]:
        """Each job's part of the batch, and what the models say about it."""
        hidden_TD = self._hidden(batch, train)
        heads = {slot: self.jobs[slot].value_D for slot in set(batch.slots)}
        wanted_T = batch.weight_T != 0
        for slot, first, end in batch.slot_ranges():
            if heads[slot] is not None and not needs(self.jobs[slot].objective, "token_values"):
                wanted_T[first:end] = False
        logprob_T = self._logprobs(batch, hidden_TD, wanted_T)
        scored = []
        for slot, first, end in batch.slot_ranges():
            part, value_D = batch.of_slot(slot), heads[slot]
            own_TD, value_S, value_T = hidden_TD[first:end], None, None
            if value_D is not None and needs(self.jobs[slot].objective, "token_values"):
                value_T = token_values(own_TD, value_D)
            elif value_D is not None:
                value_S = last_token_values(own_TD, part.start_S1, value_D)
            scored.append((slot, part, Scores(logprob_T[first:end], part.reference_T, value_S, value_T)))
        return scored

    def _hidden(self, batch: Batch, train: bool) -> torch.Tensor:
        """The last hidden states, (T, D), each segment through its own slot."""
        draws = {slot: Draws(job.seed, job.step, job.neftune_alpha) for slot, job in self.jobs.items()}
        return self.bank.hidden(batch, draws if train else None)

    def _logprobs(self, batch: Batch, hidden_TD: torch.Tensor, wanted_T: torch.Tensor) -> torch.Tensor:
        """log p of every target that is wanted, (T), 0 elsewhere; only those rows ever meet the vocabulary."""
        pieces = []
        for head, first, end in self._heads(batch):
            index_K = wanted_T[first:end].nonzero()[:, 0] + first
            pieces.append((index_K, logprobs(hidden_TD[index_K], batch.target_T[index_K], head)))
        index_K = torch.cat([index for index, _ in pieces])
        logprob_K = torch.cat([logprob for _, logprob in pieces])
        return logprob_K.new_zeros(batch.num_tokens).index_put((index_K,), logprob_K)

    def _fresh_value_head(self, seed: int) -> torch.nn.Parameter:
        """(D) float32 or wider, drawn as transformers draws the head of a sequence classifier."""
        std = getattr(self.base.model.config.get_text_config(), "initializer_range", None) or 0.02
        generator = torch.Generator().manual_seed(key_of(seed, VALUE_HEAD))
        value_D = std * torch.randn(self.base.hidden_size, generator=generator)
        return torch.nn.Parameter(value_D.to(self.base.device, torch.promote_types(self.base.dtype, torch.float32)))

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


def _learned(work: Work) -> dict[int, list[Segment]]:
    """What the losses are of: everything that is not only observed."""
    return {slot: [segment for segment in segments if segment.role != MISMATCHED] for slot, segments in work.items()}


def _add(metrics: Metrics, extra: Metrics) -> None:
    """Shares of one micro-batch, added where they are: nothing waits for the device."""
    for name, value in extra.items():
        metrics[name] = metrics[name] + value if name in metrics else value


def _floats(metrics: Metrics) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def _sum_up(totals: Totals, more: Totals) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value
