"""Gradient-free forward passes: log-probabilities, losses and values of given tokens, without dropout or noise.

The work is divided into lanes (train/lanes.py) and cut into micro-batches that fit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from lowrank.adapters.bank import Bank
from lowrank.batches import Batch, Scores, Totals
from lowrank.errors import ModelError
from lowrank.kernels.accelerators import wide
from lowrank.kernels.value_head import token_values
from lowrank.models.base import Base
from lowrank.notices import log_notice
from lowrank.objectives import Metrics, ObservesMismatched, loss_and_metrics, needs, totals_of
from lowrank.segments import MISMATCHED, Segment, number_the_step
from lowrank.train.batch_scores import BatchScores
from lowrank.train.lanes import LanePasses, Lanes, OneLane, Split
from lowrank.train.micro_batching import StepSegments, split_into_micro_batches, units
from lowrank.train.out_of_memory import explain_out_of_memory, give_back_unused, is_out_of_memory
from lowrank.train.passes import Passes
from lowrank.train.prepared_pass import all_logprobs
from lowrank.train.row_losses import joined, row_losses
from lowrank.train.step_metrics import add_metrics, add_totals, read_metrics_to_host
from lowrank.train.trained_job import ForwardResult, RowLosses, TrainedJob
from lowrank.train.update import eval_weights

_Result = TypeVar("_Result")
LOSS = ""
"""The key of the loss among a slot's metrics; no metric is called so."""
_NOT_ALONE = (
    "out of memory in a forward pass of up to {tokens} tokens. The devices that share a base compute together, so none "
    "can do its part again alone, and all stop: go on from the last checkpoint (resume: true) with a smaller "
    "micro_batch_tokens, or with model.activation_checkpointing: full"
)


class ScoringEngine:
    """Forward passes of a base and a bank of adapters for any number of jobs. See train/engine.py."""

    def __init__(self, base: Base, bank: Bank, micro_batch_tokens: int, shares_prompts: bool = False) -> None:
        """`shares_prompts`: answers to one prompt share its computation. Not every base can
        (models/checks/isolation.py)."""
        self.base = base
        self.bank = bank
        self.micro_batch_tokens = micro_batch_tokens
        self.notify: Callable[[str], None] = log_notice
        """Called with texts for the user, by default a log line."""
        self.jobs: dict[int, TrainedJob] = {}
        self.shares_prompts = shares_prompts
        self.reference_base: Base | None = None
        """A frozen reference model, where it is not the base itself; None: the base without adapter is the
        reference."""
        self.lanes: Lanes = OneLane()
        """How a step is divided between processes (train/lanes.py)."""
        self._scores = BatchScores(base, bank, self.jobs)
        self.passes = Passes(base, bank, self.jobs)

    def eval_weights(self, slots: Iterable[int]) -> contextlib.AbstractContextManager[None]:
        """Context in which the jobs of `slots` have the weights that are evaluated and saved (train/update.py)."""
        return eval_weights([self.jobs[slot] for slot in slots if slot in self.jobs])

    @torch.no_grad()
    def evaluate(self, work: StepSegments, by_row: Collection[int] = ()) -> dict[int, ForwardResult]:
        """Return losses and metrics of held-out segments, of any number of jobs together, without dropout or noise.
        `by_row`: slots for which the losses of single rows are returned too."""
        with self.eval_weights(work):
            return self._with_room(work, partial(self._evaluate, by_row=by_row), lambda _: None)

    @torch.no_grad()
    def logprobs(self, slot: int, segments: Sequence[Segment]) -> list[np.ndarray]:
        """Return the log-probabilities of each segment's tokens under a slot (-1: the bare base), without dropout or
        noise: (L) float32 each, 0 where the token carries no weight."""
        virtual = self.bank.num_virtual(slot)

        def of_lane(batches: list[Batch]) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for batch in batches:
                ready = self.passes.ready(batch, train=False)
                hidden_TD = self.passes.hidden(ready)
                with self.base.placement.head():
                    logprob_T = all_logprobs(ready, hidden_TD).float().cpu()
                for piece_L, prefix in zip(logprob_T.split(batch.lengths), batch.prefixes):
                    known_L = piece_L.roll(1).numpy()  # the last prediction of a segment is of nothing, and 0
                    found.append(np.concatenate([np.zeros(prefix, np.float32), known_L])[virtual:])
            return found

        return self._of_segments(slot, segments, self.micro_batches, of_lane)

    @torch.no_grad()
    def values(self, slot: int, segments: Sequence[Segment], value_D: torch.Tensor | None = None) -> list[np.ndarray]:
        """Return what a value head (None: the job's own) predicts at each token of each segment, (L) float32 each."""
        head_D = self.jobs[slot].value_D if value_D is None else value_D.to(self.base.device)
        assert head_D is not None, f"the job in slot {slot} has no value head"
        virtual = self.bank.num_virtual(slot)

        def of_lane(batches: list[Batch]) -> list[np.ndarray]:
            found: list[np.ndarray] = []
            for batch in batches:
                batch = self.passes.prefetcher.with_pixels(batch).to(self.base.device)
                value_T = token_values(self.bank.hidden(batch), head_D).float().cpu()
                found += [piece_L[virtual:].numpy() for piece_L in value_T.split(batch.lengths)]
            return found

        return self._of_segments(slot, segments, partial(self.micro_batches, share_prefixes=False), of_lane, head=False)

    def micro_batches(self, work: StepSegments, share_prefixes: bool = True) -> list[Batch]:
        """Split a step into micro-batches of at most `micro_batch_tokens` tokens (train/micro_batching.py). With
        `share_prefixes`, where the base can, answers to one prompt in one micro-batch share its computation."""
        share_prefixes = share_prefixes and self.shares_prompts
        return split_into_micro_batches(self.base, self.bank, work, self.micro_batch_tokens, share_prefixes)

    def _evaluate(self, work: StepSegments, by_row: Collection[int]) -> dict[int, ForwardResult]:
        numbered = {slot: number_the_step(segments) for slot, segments in work.items()}
        counted = segments_with_loss(numbered)
        whole = self.micro_batches(counted)
        totals = self._totals(numbered, whole)
        found = []
        for batches, idle in self._expected(counted, whole, self.micro_batches):
            found.append(self._evaluate_lane(batches, totals, by_row))
            self.passes.idle(idle)
        rows = self.lanes.rows(counted, [of_rows for _, of_rows in found]) if by_row else {}
        evaluated = {}
        for slot, numbers in read_metrics_to_host(self.lanes.metrics([metrics for metrics, _ in found])).items():
            loss = numbers.pop(LOSS)
            evaluated[slot] = ForwardResult(loss, sum(map(len, work[slot])), totals[slot], numbers, rows.get(slot))
        return evaluated

    def _evaluate_lane(
        self, batches: Sequence[Batch], totals: Mapping[int, Totals], by_row: Collection[int]
    ) -> tuple[dict[int, Metrics], dict[int, RowLosses]]:
        losses: dict[int, float | torch.Tensor] = dict.fromkeys(totals, 0.0)
        metrics: dict[int, Metrics] = {slot: {} for slot in totals}
        rows: dict[int, list[RowLosses]] = {slot: [] for slot in by_row}
        for batch in batches:
            for slot, part, scores in self._score(batch):
                objective = self.jobs[slot].objective
                loss, extra = loss_and_metrics(objective, scores, part, totals[slot])
                losses[slot] = losses[slot] + wide(loss)
                if slot in rows:
                    rows[slot].append(row_losses(objective, scores, part, totals[slot]))
                add_metrics(metrics[slot], extra)
        sums = {slot: {**metrics[slot], LOSS: loss} for slot, loss in losses.items()}
        return sums, {slot: joined(parts) for slot, parts in rows.items()}

    def _of_segments(
        self,
        slot: int,
        segments: Sequence[Segment],
        split: Split,
        of_lane: Callable[[list[Batch]], list[np.ndarray]],
        head: bool = True,
    ) -> list[np.ndarray]:
        """Return what `of_lane` returns, for the segments of all lanes. `head`: see `Passes.idle`."""
        work, found = {slot: segments}, []
        for batches, idle in self._expected(work, None, split):
            found.append(of_lane(batches))
            self.passes.idle(idle, head=head)
        return self.lanes.arrays(work, found)

    def _expected(
        self,
        work: StepSegments,
        whole: list[Batch] | None,
        split: Split,
        next_segments: Sequence[Segment] | None = None,
    ) -> list[LanePasses]:
        """The passes of each lane of this rank, whose media threads make ready. `next_segments`: see
        `Passes.expect`."""
        lanes = self.lanes.passes(work, whole, split)
        self.passes.expect([batch for lane in lanes for batch in lane.batches], next_segments)
        return lanes

    def _totals(self, work: StepSegments, batches: Sequence[Batch]) -> dict[int, Totals]:
        """Return what the losses of a step are divided by: counted, and for objectives that need it, observed."""
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
            found = []
            for batches, idle in self._expected(observed, None, self.micro_batches):
                found.append(self._observe(batches))
                self.passes.idle(idle)
            for slot, sums in self.lanes.metrics(found).items():
                add_totals(totals[slot], {name: float(value) for name, value in sums.items()})
        return totals

    @torch.no_grad()
    def _observe(self, batches: Sequence[Batch]) -> dict[int, Metrics]:
        found: dict[int, Metrics] = {}
        for batch in batches:
            for slot, part, scores in self._score(batch):
                objective = self.jobs[slot].objective
                assert isinstance(objective, ObservesMismatched), "only such have segments of this role"
                add_metrics(found.setdefault(slot, {}), dict(objective.observe(scores, part)))
        return found

    def _score(self, batch: Batch) -> list[tuple[int, Batch, Scores]]:
        """Return each job's part of the batch, on the device, and its scores, without dropout or noise."""
        ready = self.passes.ready(batch, train=False, wanted_T=self._scores.targets(batch))
        return self._scores.of(ready, self.passes.hidden(ready), self.reference_base)

    def _with_room(
        self, work: StepSegments, run: Callable[[StepSegments], _Result], undo: Callable[[StepSegments], None] | None
    ) -> _Result:
        """Return `run(work)`; where memory runs out, call `undo` and run again with micro-batches of half the size."""
        while True:
            with explain_out_of_memory("computing a forward pass that cannot be cut smaller"):
                try:
                    return run(work)
                except Exception as error:
                    if self.base.placement.in_step and is_out_of_memory(error):
                        raise ModelError(_NOT_ALONE.format(tokens=self.micro_batch_tokens)) from error
                    batches = self.micro_batches(work)
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


def segments_with_loss(work: StepSegments) -> dict[int, list[Segment]]:
    """What the losses are of: everything that is not only observed."""
    return {slot: [segment for segment in segments if segment.role != MISMATCHED] for slot, segments in work.items()}
