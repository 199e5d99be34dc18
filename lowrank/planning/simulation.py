"""One optimiser step of a run without its weights: the real model class, adapters and loss on fake tensors.

Fake tensors have a shape, a dtype and a device but no memory, so a step of any model takes a second or two and
every allocation it would make is counted (live_bytes.py). There is no formula per family: what a model
saves for its backward pass, what recomputation saves, how large its attention's and its experts'
temporaries are, is found by running it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers.initialization import no_init_weights

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import Draws
from lowrank.adapters.variants import AdapterConfig
from lowrank.adapters.virtual import runs_of
from lowrank.errors import ModelError
from lowrank.kernels.logprobs import logprobs
from lowrank.models.attention import BoundariesMissing
from lowrank.models.base import Base
from lowrank.models.config import Config as ModelConfig
from lowrank.models.config import FreezeConfig
from lowrank.models.depths import as_planned
from lowrank.models.freezing import train_only
from lowrank.models.loading import choose_device, choose_dtype, locate
from lowrank.models.quiet import quiet_transformers
from lowrank.models.recompute import set_recompute
from lowrank.models.rope import stretch
from lowrank.objectives import Objective
from lowrank.planning.layers import keep_layers
from lowrank.planning.lean import make_lean_unseen
from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.stand_in import stand_in_for_experts, stand_in_for_packed_weights
from lowrank.records import BARE_BASE, Batch, Segment, pack
from lowrank.train.cut import Work
from lowrank.train.engine import Engine
from lowrank.train.optimizers import OptimizerConfig


@dataclass(frozen=True)
class PlannedJob:
    """What of a job decides about memory. `adapter` None: the base's own parameters are trained."""

    adapter: AdapterConfig | None
    objective: Objective
    optimizer: OptimizerConfig
    step: Sequence[Segment]
    """Its heaviest optimiser step."""
    neftune_alpha: float = 0.0
    freeze: FreezeConfig | None = None
    """Of a job without adapter: which of the base's parameters it trains; None: all."""
    tokens_of_steps: Sequence[int] = ()
    """Of its steps, as far as they are known."""


@dataclass(frozen=True)
class StepTrace:
    """Bytes of tensors seen in one simulated step. The phases are peaks above what lives between steps."""

    base: int
    adapters: int
    optimizer: int
    gradients: int
    """After the last forward pass of the step."""
    earlier: int
    """Those of them that the passes before this one have left."""
    kept: int
    """What the backbone's graph keeps for the backward pass."""
    forward: int
    loss: int
    backward: int

    def plus(self, other: StepTrace, times: int) -> StepTrace:
        """Each number plus `times` the other's."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return StepTrace(*(one + times * two for one, two in pairs))


@dataclass(frozen=True)
class Heaviest:
    """The largest forward pass of an optimiser step."""

    batch: Batch
    passes: int
    """Of the step."""
    others: frozenset[int]
    """Slots that have a part in the other passes, so that their gradients may be there already."""


class Simulation:
    """The base, with all or some of its decoder layers, and the jobs of a run, on fake tensors."""

    def __init__(self, model: ModelConfig, config: Any, jobs: Sequence[PlannedJob], keep: Sequence[int] | None) -> None:
        """`config` is the model's config.json (`read_config`), `keep` the decoder layers to keep; None: all."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._live = LiveBytes()
        self._device = choose_device(model)
        with self._mode, self._live:
            self.base = self._build(model, config, jobs, keep)
            self._base_bytes = self._live.now + self._packed
            self._engine = Engine(self.base, Bank(self.base), 1)
            self.slots = [self._add(job, seed) for seed, job in enumerate(jobs)]
        self._adapter_bytes = self._live.now + self._packed - self._base_bytes
        self._optimizer_bytes: int | None = None

    def _build(
        self, settings: ModelConfig, config: Any, jobs: Sequence[PlannedJob], keep: Sequence[int] | None
    ) -> Base:
        with quiet_transformers(), torch.device(self._device), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=choose_dtype(settings, self._device), trust_remote_code=settings.trust_remote_code
            )
        model.tie_weights()
        if settings.lean:
            with unset_fake_temporarily():
                make_lean_unseen(model)
        routed = as_planned(model, settings)
        if keep is not None:
            keep_layers(model, keep)
        train_what_is_trained(model, jobs)
        model.eval()
        self._packed = stand_in_for_packed_weights(model, settings.storage)
        stand_in_for_experts(model)
        base = Base(model, None, settings.path, settings.revision)
        base.depths = routed
        base.settle("packed")
        if settings.attention == "padded" or not self._takes_boundaries(base):
            base.settle("padded")
        base.shift_attn = settings.shift_attn
        base.shares_prompts = base.layout == "packed" and base.shift_attn is None and routed is None
        return base

    def _takes_boundaries(self, base: Base) -> bool:
        """The leak test needs weights; this much shows without."""
        segment = Segment(np.zeros(4, np.int64), np.zeros(4, np.float32))
        try:
            with torch.no_grad():
                base.hidden(self._fake(pack([(BARE_BASE, segment)])), training=True)
        except BoundariesMissing:
            return False
        return True

    def _add(self, job: PlannedJob, seed: int) -> int:
        slot = BARE_BASE if job.adapter is None else self._engine.bank.add(job.adapter, seed=seed)
        at_once = job.optimizer.model_copy(update={"layerwise": False})
        self._engine.add(slot, job.objective, at_once, seed, job.neftune_alpha)
        if job.optimizer.layerwise:
            self._drop_gradients_as_they_come()
        return slot

    def _drop_gradients_as_they_come(self) -> None:
        """As layer-wise updates do; what the optimiser keeps is found out in a step of its own."""
        masters = self._engine.jobs[BARE_BASE].parameters
        for name, weight in self.base.model.named_parameters():  # a value head is small
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda _, name=name: setattr(masters[name], "grad", None))

    def _fake(self, batch: Batch) -> Batch:
        fake = {name: self._move(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(batch, **fake)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._mode.from_tensor(tensor).to(self._device)

    def heaviest_batch(self, work: Work, micro_batch_tokens: int) -> Heaviest:
        """The forward pass with the most tokens of a step that is cut so."""
        self._engine.micro_batch_tokens = micro_batch_tokens
        batches = self._engine.cut(work)
        heaviest = max(batches, key=lambda batch: self.base.padded_tokens(batch.lengths))
        others = frozenset(slot for batch in batches if batch is not heaviest for slot in batch.slots)
        return Heaviest(heaviest, len(batches), others)

    def step(self, heaviest: Heaviest, recompute: str | int) -> StepTrace:
        """What the engine does with one forward pass, and then the optimisers, with nothing to read."""
        set_recompute(self.base.model, recompute)
        batch, engine, live = heaviest.batch, self._engine, self._live
        rows, fake = self.base.rows(batch), self._fake(batch)
        chosen = [
            (head, self._move(batch.weight_T[first:end].nonzero()[:, 0] + first))
            for head, first, end in engine._heads(batch)
        ]
        draws = {slot: Draws(job.seed, job.step, job.neftune_alpha) for slot, job in engine.jobs.items()}
        counter_N, length_N = self._move(rows.counter_N), self._move(rows.length_N)
        engine.bank.routing.set(rows.num_rows, rows.ranges, counter_N, length_N, draws, runs_of(batch))
        before = live.now
        with _torch_keeps_quiet(), self._mode, live:
            self._leave_gradients(heaviest.others)
            earlier = live.now - before
            with live.phase() as forward:
                hidden_TD = self.base.hidden(fake, training=True)
            kept = live.now - before - earlier
            with live.phase() as loss:
                pieces = [logprobs(hidden_TD[index_K], fake.target_T[index_K], head) for head, index_K in chosen]
                total = torch.cat(pieces).sum()
            del hidden_TD, pieces
            with live.phase() as backward:
                total.backward()
        del total
        with self._mode, live:
            self._leave_gradients(set(engine.jobs) - {BARE_BASE})
        gradients = live.now - before
        optimizer = self._optimizer_state()
        for job in engine.jobs.values():
            job.optimizer.zero_grad(set_to_none=True)
        phases = (each.bytes - before for each in (forward, loss, backward))
        return StepTrace(self._base_bytes, self._adapter_bytes, optimizer, gradients, earlier, kept, *phases)

    def _leave_gradients(self, slots: Collection[int]) -> None:
        """As forward passes of these slots do, where there are none yet."""
        for slot in slots:
            for parameter in self._engine.jobs[slot].parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)

    def _optimizer_state(self) -> int:
        """Bytes of all optimisers' state, found by one step of each; the gradients are there."""
        if self._optimizer_bytes is None:
            with self._mode:
                self._leave_gradients(set(self._engine.jobs))  # of a layer-wise job there are none any more
            known = [job.settings.state_bytes(job.parameters) for job in self._engine.jobs.values()]
            watched = [job for job, size in zip(self._engine.jobs.values(), known) if size is None]
            with self._mode, self._live as live:
                before = live.now
                for job in watched:
                    job.optimizer.step()
                self._optimizer_bytes = live.now - before + sum(size for size in known if size is not None)
                for job in watched:
                    job.optimizer.state.clear()
        return self._optimizer_bytes


def train_what_is_trained(model: Any, jobs: Sequence[PlannedJob]) -> None:
    """Set `requires_grad` of the base's own parameters."""
    of_base = [job for job in jobs if job.adapter is None]
    model.requires_grad_(bool(of_base))
    for job in of_base:
        if job.freeze is not None:
            train_only(model, job.freeze)


@contextlib.contextmanager
def _torch_keeps_quiet() -> Iterator[None]:
    """It logs a traceback for every operator that has no fake form; the error itself is enough."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def read_config(config: ModelConfig) -> Any:
    """The model's config.json. ModelError if it cannot be had."""
    with quiet_transformers():
        try:
            found = transformers.AutoConfig.from_pretrained(
                locate(config.path), revision=config.revision, trust_remote_code=config.trust_remote_code
            )
            stretch(found, config.rope_scaling)
            return found
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot read the configuration of {config.path!r}: {error}") from error


def work_of(slots: Sequence[int], jobs: Sequence[PlannedJob]) -> Mapping[int, Sequence[Segment]]:
    """The heaviest step of every job, together."""
    return {slot: job.step for slot, job in zip(slots, jobs)}
