"""The engine: the few operations on a bank of adapters that all training is made of.

    forward_backward(work)   gradients of one optimizer step of any number of jobs
    optim_step(slot)         clip, guard, update one job's parameters
    evaluate(work)           losses and the objectives' metrics, no gradients (train/scoring.py)
    logprobs(slot, segments) log-probabilities of given tokens (train/scoring.py)
    (sampling is generate/, saving and loading are checkpoints/: both need only the base and the bank)

Jobs share no trained parameter, so the gradient of the sum of their losses is each job's own. What could couple them is
kept per job: normalization, clipping, finite check, optimizer state, random numbers. One pass through base and adapters
is train/passes.py.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT, Batch, Totals
from lowrank.errors import ModelError
from lowrank.kernels.glibc_malloc import Heap
from lowrank.models.base import Base
from lowrank.objectives import Metrics, Objective, loss_and_metrics
from lowrank.segments import Segment
from lowrank.train.layerwise import LayerwiseUpdates
from lowrank.train.micro_batching import StepSegments
from lowrank.train.new_job import new_job
from lowrank.train.optimizers import OptimizerConfig, set_learning_rate
from lowrank.train.prepared_pass import PreparedPass
from lowrank.train.router_loss import TokensOfStep, router_losses
from lowrank.train.scoring import LOSS, ScoringEngine, segments_with_loss
from lowrank.train.step_metrics import add_metrics, read_metrics_to_host
from lowrank.train.trained_job import ForwardResult, UpdateResult
from lowrank.train.update import update

_LARGE_PASS = 1024
"""Tokens. To give memory back and take it again costs about half a second for each GB: a sixth of a step of passes of
256 tokens, where it saves a fifteenth of the memory, and a twentieth of one of 4,096, where it saves a third."""


class Engine(ScoringEngine):
    """Trains jobs by slot. A full-parameter job has the slot of the bare base."""

    def __init__(self, base: Base, bank: Bank, micro_batch_tokens: int, shares_prompts: bool = False) -> None:
        super().__init__(base, bank, micro_batch_tokens, shares_prompts)
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
        """Train what is in `slot` (BASE_SLOT: the base's own parameters). `num_steps`: see TrainedJob."""
        self.jobs[slot] = new_job(
            self.base,
            self.bank,
            slot,
            objective,
            settings,
            seed=seed,
            neftune_alpha=neftune_alpha,
            num_steps=num_steps,
            notify=self.notify,
        )

    def remove(self, slot: int) -> None:
        """Forget a job's optimizer; its adapter stays in the bank."""
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

    def forward_backward(
        self,
        work: StepSegments,
        learning_rates: Mapping[int, float] | None = None,
        next_segments: Sequence[Segment] = (),
    ) -> dict[int, ForwardResult]:
        """Accumulate the gradients of one optimizer step of every job in `work`.

        All jobs go through the base together, in as few passes as `micro_batch_tokens` allows; how the
        step is cut changes nothing but rounding. Where memory runs out, it is cut smaller and done again, with the same
        random draws. A job whose optimizer is `layerwise` is updated here, if `learning_rates` has its rate.
        `next_segments`: what comes after this step, as far as it is known, whose pictures are decoded meanwhile.
        """
        clean = all(p.grad is None for slot in work for p in self.jobs[slot].parameters.values())
        layerwise = self._begin_layerwise(work, learning_rates or {})

        def undo(work: StepSegments) -> None:
            if layerwise is not None and layerwise.updated:
                raise ModelError(
                    "memory ran out within the updates of optimizer.layerwise, so the step cannot be done again: lower "
                    "micro_batch_tokens and go on from the last checkpoint (resume: true)"
                )
            self._clear_gradients(work)

        run = partial(self._forward_backward, layerwise=layerwise, next_segments=next_segments)
        return self._with_room(work, run, undo if clean else None)

    def _begin_layerwise(self, work: StepSegments, learning_rates: Mapping[int, float]) -> LayerwiseUpdates | None:
        """What updates the base within this step's backward pass, if anything does."""
        job = self.jobs[BASE_SLOT] if BASE_SLOT in work else None
        if job is None or job.layerwise is None:
            return None
        job.layerwise.begin()
        if BASE_SLOT not in learning_rates:
            return None
        set_learning_rate(job.optimizer, learning_rates[BASE_SLOT])
        return job.layerwise

    def _forward_backward(
        self, work: StepSegments, layerwise: LayerwiseUpdates | None, next_segments: Sequence[Segment]
    ) -> dict[int, ForwardResult]:
        counted = segments_with_loss(work)
        whole = self.micro_batches(counted)  # on the host, where counting waits for nobody
        totals, of_step = self._totals(work, whole), TokensOfStep.of(whole)
        gradients = self.lanes.gradients([each for slot in work for each in self.jobs[slot].parameters.values()])
        metrics_of_lanes = []
        for batches, idle in self._expected(counted, whole, self.micro_batches, next_segments):
            metrics_of_lanes.append(self._lane(batches, totals, of_step, layerwise))
            self.passes.idle(idle, train=True)
            gradients.accumulate()
        gradients.finish_reduce()
        metrics = self.lanes.metrics(metrics_of_lanes)
        for slot in work:
            self._add_penalty(slot, metrics[slot])
        forwarded = {}
        for slot, numbers in read_metrics_to_host({slot: metrics[slot] for slot in work}).items():
            loss = numbers.pop(LOSS)
            self.jobs[slot].loss_is_finite &= math.isfinite(loss)
            forwarded[slot] = ForwardResult(loss, sum(map(len, work[slot])), totals[slot], numbers)
        return forwarded

    def _lane(
        self,
        batches: Sequence[Batch],
        totals: Mapping[int, Totals],
        of_step: TokensOfStep,
        layerwise: LayerwiseUpdates | None,
    ) -> dict[int, Metrics]:
        """Run the forward and backward passes of one lane. Returns its sums of losses and metrics by slot, still on the
        device."""
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in totals}
        metrics: dict[int, Metrics] = {slot: {} for slot in totals}
        for number, batch in enumerate(batches):
            if number and sum(batch.lengths) >= _LARGE_PASS:
                self._heap.trim()  # gradients lie between what the last pass left, and this one finds no place in it
            ready = self.passes.ready(batch, wanted_T=self._scores.targets(batch), tokens_of_step=of_step.all)

            def loss_of(hidden_TD: torch.Tensor, ready: PreparedPass = ready) -> torch.Tensor:
                terms, of_routers = [], router_losses(self.base, ready.batch, of_step.by_slot)
                for slot, part, scores in self._scores.of(ready, hidden_TD, self.reference_base):
                    loss, extra = loss_and_metrics(self.jobs[slot].objective, scores, part, totals[slot])
                    if slot in of_routers:
                        loss = loss + of_routers[slot]
                        add_metrics(metrics[slot], {"router_loss": of_routers[slot].detach()})
                    scale = self.jobs[slot].scale
                    terms.append(loss if scale is None else loss * scale.value)
                    losses[slot].append(loss.detach())
                    add_metrics(metrics[slot], extra)
                return torch.stack(terms).sum()

            def updating(last: bool = number == len(batches) - 1) -> contextlib.AbstractContextManager[object]:
                updates = layerwise is not None and last and math.isfinite(sum(losses[BASE_SLOT]))
                return layerwise.updating() if layerwise is not None and updates else contextlib.nullcontext()

            self.passes.train(ready, loss_of, updating)
        return {
            slot: {**metrics[slot], LOSS: torch.stack(terms).sum() if terms else 0.0} for slot, terms in losses.items()
        }

    def _add_penalty(self, slot: int, metrics: Metrics) -> None:
        """The gradient of what an adapter itself wants small, which is no part of the loss that is reported."""
        penalty = None if slot == BASE_SLOT else self.bank.penalty(slot)
        if penalty is not None:
            scale = self.jobs[slot].scale
            (penalty if scale is None else penalty * scale.value).backward()
            metrics["penalty"] = penalty.detach()

    def optim_step(self, slot: int, learning_rate: float) -> UpdateResult:
        """Update one job's parameters from its gradients, clipped to its own norm, and clear them (train/update.py)."""
        job = self.jobs[slot]

        def after_update() -> None:
            if slot != BASE_SLOT and job.num_steps is not None:
                self.bank.after_update(slot, job.step, job.num_steps)

        return update(job, learning_rate, after_update)

    def _clear_gradients(self, work: StepSegments) -> None:
        for slot in work:
            self.jobs[slot].optimizer.zero_grad(set_to_none=True)
