"""The engine: a few verbs over a bank of adapters. Everything that trains is a client of these.

    forward_backward(work)   gradients of one optimizer step of any number of jobs
    optim_step(slot)         clip, guard, update one job's parameters
    evaluate(work)           losses and the objectives' metrics, no gradients
    logprobs(slot, segments) what a slot thinks of given tokens
    (sampling is generate/, saving and loading are checkpoints/: both need only the base and the bank)

Jobs share nothing that is trained, so the gradient of the sum of their losses is each job's own. What
could tie them is kept per job: normalization, clipping, finite check, optimizer state, random draws.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import Draws
from lowrank.batches import BARE_BASE, MISMATCHED, Batch, Scores, Segment, Totals, number_the_step, pack, to_device
from lowrank.errors import ModelError
from lowrank.kernels.host_memory import Heap
from lowrank.kernels.value_head import token_values
from lowrank.models.base import Base
from lowrank.notices import log_notice
from lowrank.objectives import Metrics, Objective, ObservesMismatched, needs, share_of_loss, totals_of
from lowrank.train.batch_scores import BatchScores
from lowrank.train.lanes import Cut, Lanes, OneLane
from lowrank.train.layerwise import LayerwiseUpdates
from lowrank.train.micro_batching import StepSegments, split_into_micro_batches, units
from lowrank.train.new_job import new_job
from lowrank.train.numbers_of_step import add_shares, add_totals, read_together
from lowrank.train.optimizers import OptimizerConfig, set_learning_rate
from lowrank.train.out_of_memory import explain_out_of_memory, give_back_unused, is_out_of_memory
from lowrank.train.pixels_ahead import PixelsAhead
from lowrank.train.prepared_pass import PassRecorder, PreparedPass, Unrecorded, all_logprobs, heads_of, wanted_logprobs
from lowrank.train.router_loss import TokensOfStep, router_losses
from lowrank.train.row_losses import joined, row_losses
from lowrank.train.trained_job import Forwarded, RowLosses, TrainedJob, Updated
from lowrank.train.update import settled, update

_Result = TypeVar("_Result")
_LOSS = ""
"""Among the numbers that are read together, no metric's name."""
_NOT_ALONE = (
    "out of memory in a forward pass of up to {tokens} tokens. The devices that share a base compute together, so none "
    "can do its part again alone, and all stop: go on from the last checkpoint (resume: true) with a smaller "
    "micro_batch_tokens, or with model.activation_checkpointing: full"
)
_LARGE_PASS = 1024
"""Tokens. To give memory back and take it again costs about half a second for each GB: a sixth of a step of passes of
256 tokens, where it saves a fifteenth of the memory, and a twentieth of one of 4,096, where it saves a third."""


class Engine:
    """Trains jobs by slot. A full-parameter job has the slot of the bare base."""

    def __init__(self, base: Base, bank: Bank, micro_batch_tokens: int, shares_prompts: bool = False) -> None:
        """`shares_prompts`: answers to one prompt go through after one computation of it. Not every base can
        (models/checks/isolation.py)."""
        self.base = base
        self.bank = bank
        self.micro_batch_tokens = micro_batch_tokens
        self.notify: Callable[[str], None] = log_notice
        """Hears what a person should know."""
        self.jobs: dict[int, TrainedJob] = {}
        self.shares_prompts = shares_prompts
        self.reference_base: Base | None = None
        """What jobs compare with that is not the base itself, which they may be changing."""
        self.lanes: Lanes = OneLane()
        """How a step is divided among processes."""
        self._scores = BatchScores(base, bank, self.jobs)
        self._heap = Heap()
        self._ahead = PixelsAhead(base)

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
        following: Sequence[Segment] = (),
    ) -> dict[int, Forwarded]:
        """Accumulate the gradients of one optimizer step of every job in `work`.

        All jobs go through the base together, in as few passes as `micro_batch_tokens` allows; how the
        step is cut changes nothing but rounding. Where memory runs out, it is cut smaller and done again, with the same
        random draws. A job whose optimizer is `layerwise` is updated here, if `learning_rates` has its rate.
        `following`: what comes after this step, as far as it is known, whose pictures are decoded meanwhile.
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

        run = partial(self._forward_backward, layerwise=layerwise, following=following)
        return self._with_room(work, run, undo if clean else None)

    def _begin_layerwise(self, work: StepSegments, learning_rates: Mapping[int, float]) -> LayerwiseUpdates | None:
        """What updates the base within this step's backward pass, if anything does."""
        job = self.jobs[BARE_BASE] if BARE_BASE in work else None
        if job is None or job.layerwise is None:
            return None
        job.layerwise.begin()
        if BARE_BASE not in learning_rates:
            return None
        set_learning_rate(job.optimizer, learning_rates[BARE_BASE])
        return job.layerwise

    def _forward_backward(
        self, work: StepSegments, layerwise: LayerwiseUpdates | None, following: Sequence[Segment]
    ) -> dict[int, Forwarded]:
        learned = _learned(work)
        whole = self.cut(learned)  # on the host, where counting waits for nobody
        totals, of_step = self._totals(work, whole), TokensOfStep.of(whole)
        gradients = self.lanes.gradients([each for slot in work for each in self.jobs[slot].parameters.values()])
        shares_of_lanes, lanes = [], self.lanes.passes(learned, whole, self.cut)
        for number, (batches, idle) in enumerate(lanes, start=1):
            after = following if number == len(lanes) else ()
            shares_of_lanes.append(self._lane(batches, totals, of_step, layerwise, after))
            self._idle(idle, train=True)
            gradients.take()
        gradients.spread()
        shares = self.lanes.metrics(shares_of_lanes)
        for slot in work:
            self._add_penalty(slot, shares[slot])
        forwarded = {}
        for slot, own in read_together({slot: shares[slot] for slot in work}).items():
            loss = own.pop(_LOSS)
            self.jobs[slot].loss_is_finite &= math.isfinite(loss)
            forwarded[slot] = Forwarded(loss, sum(map(len, work[slot])), totals[slot], own)
        return forwarded

    def _lane(
        self,
        batches: Sequence[Batch],
        totals: Mapping[int, Totals],
        of_step: TokensOfStep,
        layerwise: LayerwiseUpdates | None,
        following: Sequence[Segment],
    ) -> dict[int, Metrics]:
        """Forward and backward passes of one lane: its shares of losses and metrics, not read yet."""
        losses: dict[int, list[torch.Tensor]] = {slot: [] for slot in totals}
        metrics: dict[int, Metrics] = {slot: {} for slot in totals}
        for number, batch in enumerate(batches):
            self._ahead.expect(batches[number : number + 2])
            if number == len(batches) - 1:
                self._ahead.expect_step(following)
            if number and sum(batch.lengths) >= _LARGE_PASS:
                self._heap.trim()  # gradients lie between what the last pass left, and this one finds no place in it
            ready = self.ready(batch, wanted_T=self._scores.targets(batch), tokens_of_step=of_step.all)

            def loss_of(hidden_TD: torch.Tensor, ready: PreparedPass = ready) -> torch.Tensor:
                shares, of_routers = [], router_losses(self.base, ready.batch, of_step.by_slot)
                for slot, part, scores in self._scores.of(ready, hidden_TD, self.reference_base):
                    share, extra = share_of_loss(self.jobs[slot].objective, scores, part, totals[slot])
                    if slot in of_routers:
                        share = share + of_routers[slot]
                        add_shares(metrics[slot], {"router_loss": of_routers[slot].detach()})
                    scale = self.jobs[slot].scale
                    shares.append(share if scale is None else share * scale.value)
                    losses[slot].append(share.detach())
                    add_shares(metrics[slot], extra)
                return torch.stack(shares).sum()

            def updating(last: bool = number == len(batches) - 1) -> contextlib.AbstractContextManager[object]:
                updates = layerwise is not None and last and math.isfinite(sum(losses[BARE_BASE]))
                return layerwise.updating() if layerwise is not None and updates else contextlib.nullcontext()

            self._training_pass(ready, loss_of, updating)
        return {slot: {**metrics[slot], _LOSS: torch.stack(own).sum() if own else 0.0} for slot, own in losses.items()}

    def _training_pass(
        self,
        ready: PreparedPass,
        loss_of: Callable[[torch.Tensor], torch.Tensor],
        updating: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        recorder: PassRecorder | None = None,
    ) -> None:
        """One forward and backward pass. `loss_of`: of the last hidden states, (T, D); `updating`: what the backward
        pass runs inside, made when the loss is known."""
        recorder = recorder or Unrecorded()
        with self.bank.routing.using(ready.context):  # until the end: layers that are computed again read it again
            with recorder.forward():
                hidden_TD = self.base.hidden(ready.batch, training=True, tokens_of_step=ready.tokens_of_step)
            with recorder.loss():
                total = loss_of(hidden_TD)
            del hidden_TD
            with updating(), recorder.backward():
                total.backward()

    def _idle(self, passes: int, *, train: bool = False, head: bool = True) -> None:
        """So many passes of one token through the bare base, with all that ranks do together in a pass, and nothing
        that counts. `head`: the others compute with the head."""
        token = Segment(np.zeros(1, np.int64), np.zeros(1, np.float32))
        for _ in range(passes):
            ready = self.ready(pack([(BARE_BASE, token)]), train=False)
            with self.bank.routing.using(ready.context), torch.set_grad_enabled(train):
                hidden_TD = self.base.hidden(ready.batch, training=train)
                with self.base.placement.head() if head else contextlib.nullcontext():
                    pass
                if train:
                    hidden_TD.sum().backward()

    def ready(
        self,
        batch: Batch,
        train: bool = True,
        wanted_T: torch.Tensor | None = None,
        tokens_of_step: int | None = None,
    ) -> PreparedPass:
        """`prepare` on the host, where numbers can be read without waiting, and then on the base's device."""
        batch = self._ahead.shown(batch)
        prepared = replace(self.prepare(batch, train, wanted_T), tokens_of_step=tokens_of_step)
        return prepared.moved(partial(to_device, device=self.base.device))

    def prepare(self, batch: Batch, train: bool = True, wanted_T: torch.Tensor | None = None) -> PreparedPass:
        """What a forward pass over `batch` needs beside the model: of training, or without dropout and noise.

        `wanted_T`: (T) bool, the targets whose log-probabilities are asked for; None: all that carry weight.
        """
        draws = self.draws() if train else None
        wanted_T = batch.weight_T != 0 if wanted_T is None else wanted_T
        wanted = tuple(
            (head, wanted_T[first:end].nonzero()[:, 0] + first)
            for head, first, end in heads_of(self.base, self.bank, batch)
        )
        return PreparedPass(batch, self.bank.context(batch, draws), wanted)

    def draws(self) -> dict[int, Draws]:
        """Where the random numbers of each job's next training pass come from."""
        return {slot: Draws(job.seed, job.step, job.neftune_alpha) for slot, job in self.jobs.items()}

    def trace(self, ready: PreparedPass, recorder: PassRecorder) -> None:
        """Leave the gradients of one training pass, as `forward_backward` does, and let `recorder` watch it.

        An objective may read numbers, which tensors without values do not have; the sum of the log-probabilities it
        would be given takes its place.
        """

        def loss_of(hidden_TD: torch.Tensor) -> torch.Tensor:
            with self.base.placement.head():
                return torch.cat(wanted_logprobs(ready, hidden_TD)).sum()

        self._training_pass(ready, loss_of, recorder=recorder)

    def _add_penalty(self, slot: int, metrics: Metrics) -> None:
        """The gradient of what an adapter itself wants small, which is no part of the loss that is reported."""
        penalty = None if slot == BARE_BASE else self.bank.penalty(slot)
        if penalty is not None:
            scale = self.jobs[slot].scale
            (penalty if scale is None else penalty * scale.value).backward()
            metrics["penalty"] = penalty.detach()

    def optim_step(self, slot: int, learning_rate: float) -> Updated:
        """Update one job's parameters from its gradients, clipped to its own norm, and clear them (train/update.py)."""
        job = self.jobs[slot]

        def after_update() -> None:
            if slot != BARE_BASE and job.num_steps is not None:
                self.bank.after_update(slot, job.step, job.num_steps)

        return update(job, learning_rate, after_update)

    def settled(self, slots: Iterable[int]) -> contextlib.AbstractContextManager[None]:
        """Jobs as they are evaluated and kept (train/update.py)."""
        return settled([self.jobs[slot] for slot in slots if slot in self.jobs])

    @torch.no_grad()
    def evaluate(self, work: StepSegments, by_row: Collection[int] = ()) -> dict[int, Forwarded]:
        """Losses and metrics of held-out segments, of any number of jobs in one pass, without dropout or noise.
        `by_row`: slots whose rows' own losses are wanted too."""
        with self.settled(work):
            return self._with_room(work, partial(self._evaluate, by_row=by_row), lambda _: None)

    def _with_room(
        self, work: StepSegments, run: Callable[[StepSegments], _Result], undo: Callable[[StepSegments], None] | None
    ) -> _Result:
        """`run(work)`; where memory runs out, `undo` and again with forward passes of half the size."""
        while True:
            with explain_out_of_memory("computing a forward pass that cannot be cut smaller"):
                try:
                    return run(work)
                except Exception as error:
                    if self.base.placement.in_step and is_out_of_memory(error):
                        raise ModelError(_NOT_ALONE.format(tokens=self.micro_batch_tokens)) from error
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

    def _clear_gradients(self, work: StepSegments) -> None:
        for slot in work:
            self.jobs[slot].optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, work: StepSegments, by_row: Collection[int]) -> dict[int, Forwarded]:
        numbered = {slot: number_the_step(segments) for slot, segments in work.items()}
        learned = _learned(numbered)
        whole = self.cut(learned)
        totals = self._totals(numbered, whole)
        found = []
        for batches, idle in self.lanes.passes(learned, whole, self.cut):
            found.append(self._evaluate_lane(batches, totals, by_row))
            self._idle(idle)
        rows = self.lanes.rows(learned, [of_rows for _, of_rows in found]) if by_row else {}
        evaluated = {}
        for slot, own in read_together(self.lanes.metrics([shares for shares, _ in found])).items():
            loss = own.pop(_LOSS)
            evaluated[slot] = Forwarded(loss, sum(map(len, work[slot])), totals[slot], own, rows.get(slot))
        return evaluated

    def _evaluate_lane(
        self, batches: Sequence[Batch], totals: Mapping[int, Totals], by_row: Collection[int]
    ) -> tuple[dict[int, Metrics], dict[int, RowLosses]]:
        losses = dict.fromkeys(totals, 0.0)
        metrics: dict[int, Metrics] = {slot: {} for slot in totals}
        rows: dict[int, list[RowLosses]] = {slot: [] for slot in by_row}
        for batch in batches:
            for slot, part, scores in self._score(batch):
                objective = self.jobs[slot].objective
                share, extra = share_of_loss(objective, scores, part, totals[slot])
                losses[slot] += float(share)
                if slot in rows:
                    rows[slot].append(row_losses(objective, scores, part, totals[slot]))
                add_shares(metrics[slot], extra)
        shares = {slot: {**metrics[slot], _LOSS: loss} for slot, loss in losses.items()}
        return shares, {slot: joined(own) for slot, own in rows.items()}

    @torch.no_grad()
    def logprobs(self, slot: int, segments: Sequence[Segment]) -> list[np.ndarray]:
        """log p of each segment's tokens as a slot sees them (-1: the bare base), without dropout or noise.

        (L) float32 each, 0 where the token carries no weight.
        """
        virtual = self.bank.num_virtual(slot)

        def of_lane(batches: list[Batch]) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for batch in batches:
                ready = self.ready(batch, train=False)
                hidden_TD = self._hidden(ready)
                with self.base.placement.head():
                    logprob_T = all_logprobs(ready, hidden_TD).float().cpu()
                for piece_L, prefix in zip(logprob_T.split(batch.lengths), batch.prefixes):
                    known_L = piece_L.roll(1).numpy()  # the last prediction of a segment is of nothing, and 0
                    found.append(np.concatenate([np.zeros(prefix, np.float32), known_L])[virtual:])
            return found

        return self._of_segments(slot, segments, self.cut, of_lane)

    def _of_segments(
        self,
        slot: int,
        segments: Sequence[Segment],
        cut: Cut,
        of_lane: Callable[[list[Batch]], list[np.ndarray]],
        head: bool = True,
    ) -> list[np.ndarray]:
        """What `of_lane` gives for the segments of each lane, of all of them. `head`: see `_idle`."""
        work, found = {slot: segments}, []
        for batches, idle in self.lanes.passes(work, None, cut):
            found.append(of_lane(batches))
            self._idle(idle, head=head)
        return self.lanes.arrays(work, found)

    @torch.no_grad()
    def values(self, slot: int, segments: Sequence[Segment], value_D: torch.Tensor | None = None) -> list[np.ndarray]:
        """What a value head (None: the job's own) gives for each token of each segment, (L) float32 each."""
        head_D = self.jobs[slot].value_D if value_D is None else value_D.to(self.base.device)
        assert head_D is not None, f"the job in slot {slot} has no value head"
        virtual = self.bank.num_virtual(slot)

        def of_lane(batches: list[Batch]) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for batch in batches:
                batch = batch.to(self.base.device)
                value_T = token_values(self.bank.hidden(batch), head_D).float().cpu()
                found += [piece_L[virtual:].numpy() for piece_L in value_T.split(batch.lengths)]
            return found

        return self._of_segments(slot, segments, partial(self.cut, share=False), of_lane, head=False)

    def cut(self, work: StepSegments, share: bool = True) -> list[Batch]:
        """Micro-batches of at most `micro_batch_tokens` tokens (train/micro_batching.py). Where the base can, answers
        to one prompt in one micro-batch `share` its computation."""
        share = share and self.shares_prompts
        return split_into_micro_batches(self.base, self.bank, work, self.micro_batch_tokens, share)

    def _totals(self, work: StepSegments, batches: Sequence[Batch]) -> dict[int, Totals]:
        """What the losses of a step divide by: counted, and for objectives that ask for it, observed."""
        totals: dict[int, Totals] = {slot: {} for slot in work}
        for batch in batches:
            for slot, _, _ in batch.slot_ranges():
                add_totals(totals[slot], totals_of(self.jobs[slot].objective, batch.of_slot(slot)))
        observed = {
            slot: [
                each for each in work[slot] if each.role == MISMATCHED or needs(self.jobs[slot].objective, "observed")
            ]
            for slot in work
        }
        if any(observed.values()):
            lanes = []
            for batches, idle in self.lanes.passes(observed, None, self.cut):
                lanes.append(self._observe(batches))
                self._idle(idle)
            for slot, own in self.lanes.metrics(lanes).items():
                add_totals(totals[slot], {name: float(value) for name, value in own.items()})
        return totals

    @torch.no_grad()
    def _observe(self, batches: Sequence[Batch]) -> dict[int, Metrics]:
        found: dict[int, Metrics] = {}
        for batch in batches:
            for slot, part, scores in self._score(batch):
                objective = self.jobs[slot].objective
                assert isinstance(objective, ObservesMismatched), "only such have segments of this role"
                add_shares(found.setdefault(slot, {}), dict(objective.observe(scores, part)))
        return found

    def _score(self, batch: Batch) -> list[tuple[int, Batch, Scores]]:
        """Each job's part of the batch, on the device, and what the models say about it, without dropout or noise."""
        ready = self.ready(batch, train=False, wanted_T=self._scores.targets(batch))
        return self._scores.of(ready, self._hidden(ready), self.reference_base)

    def _hidden(self, ready: PreparedPass) -> torch.Tensor:
        """The last hidden states, (T, D), each segment through its own slot, of a pass without backward."""
        with self.bank.routing.using(ready.context):
            return self.base.hidden(ready.batch)


def _learned(work: StepSegments) -> dict[int, list[Segment]]:
    """What the losses are of: everything that is not only observed."""
    return {slot: [segment for segment in segments if segment.role != MISMATCHED] for slot, segments in work.items()}
