"""One optimizer step of a run without its weights: the real model class, adapters and loss on fake tensors.

Fake tensors have a shape, a dtype and a device but no memory, so a step of any model takes a second or two and
every allocation it would make is counted (live_bytes.py). There is no formula per family: what a model
saves for its backward pass, what recomputation saves, how large its attention's and its experts'
temporaries are, is found by running it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers.initialization import no_init_weights

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants import AdapterConfig
from lowrank.batches import BASE_SLOT, Batch, pack
from lowrank.errors import ModelError
from lowrank.hub_reach import hub_or_cache
from lowrank.media.processor import MediaProcessor
from lowrank.models.attention.packed import BoundariesMissing
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.config import FreezeConfig, ModelConfig
from lowrank.models.freezing import train_everything, train_only
from lowrank.models.layer_wrappers import wrapped_as_planned
from lowrank.models.loading.kind import check_path
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.pretrained import cannot_load, choose_device, choose_dtype, locate
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.native_masks import prompt_type_of
from lowrank.models.rope_scaling import stretch
from lowrank.objectives import Objective
from lowrank.planning.fake_copies import fake_copies
from lowrank.planning.fake_modules import fake_experts, fake_packed_weights, spread_evenly
from lowrank.planning.known_values import KnownValues, with_values
from lowrank.planning.layers import keep_layers
from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.memory_efficient import use_memory_efficient_fakes
from lowrank.planning.peaks import Peaks, StepTrace
from lowrank.planning.pictures import MediaTraceCache, PlannedMediaEncoder
from lowrank.segments import Media, Segment
from lowrank.train.engine import Engine
from lowrank.train.micro_batching import StepSegments
from lowrank.train.optimizers import OptimizerConfig
from lowrank.train.pixel_prefetch import DOCUMENTS_AHEAD
from lowrank.train.prepared_pass import PreparedPass


@dataclass(frozen=True)
class PlannedJob:
    """What of a job decides about memory. `adapter` None: the base's own parameters are trained."""

    adapter: AdapterConfig | None
    objective: Objective
    optimizer: OptimizerConfig
    step: Sequence[Segment]
    """Its heaviest optimizer step."""
    neftune_alpha: float = 0.0
    freeze: FreezeConfig | None = None
    """Of a job without adapter: which of the base's parameters it trains; None: all."""
    tokens_of_steps: Sequence[int] = ()
    """Of its steps, as far as they are known."""


def kinds_of(jobs: Sequence[PlannedJob]) -> list[str]:
    """Of the media in the jobs' steps."""
    found = {each.kind for job in jobs for segment in job.step if segment.media for each in segment.media.items}
    return sorted(found)


@dataclass(frozen=True)
class Heaviest:
    """A forward pass of an optimizer step that may be its heaviest moment."""

    batch: Batch
    passes: int
    """Of the step."""
    others: frozenset[int]
    """Slots that have a part in passes before it, so that their gradients are there already."""
    ahead: tuple[Media, ...] = ()
    """Whose pictures are made ready for the next pass meanwhile, or are kept for a later one."""
    shared: tuple[Media, ...] = ()
    """Of whose pictures what the tower has said is kept for later passes."""


class Simulation:
    """The base, with all or some of its decoder layers, and the jobs of a run, on fake tensors."""

    def __init__(
        self,
        model: ModelConfig,
        config: Any,
        jobs: Sequence[PlannedJob],
        keep: Sequence[int] | None,
        layout: str | None = None,
        processor: MediaProcessor | None = None,
        pictures: MediaTraceCache | None = None,
    ) -> None:
        """`config` is the model's config.json (`read_config`), `keep` the decoder layers to keep; None: all. `layout`
        of the batches, where another simulation of this model has found it out. `processor`: of the media that the jobs
        have; None: they have none. `pictures`: what other simulations of the same base, with other layers, have found
        out about them."""
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._live = LiveBytes()
        self._device = choose_device(model)
        self._media_encoder: PlannedMediaEncoder | None = None
        with self._mode, self._live, fake_copies():
            kinds = kinds_of(jobs) if processor is not None else ()
            self.base = self._build(model, config, jobs, keep, layout)
            if processor is not None:
                known = pictures or MediaTraceCache()
                self.base.media_encoder = self._media_encoder = PlannedMediaEncoder(
                    self.base, processor, kinds, self._live, known
                )
            self._base_bytes = self._live.now + self._packed
            plain = self.base.layout == "packed" and self.base.shift_attn is None and self.base.layer_wrapper is None
            self._engine = Engine(self.base, Bank(self.base), 1, shares_prompts=plain)
            self.slots = [self._add(job, seed) for seed, job in enumerate(jobs)]
        spread_evenly(self.base.model)  # adapters have come, on experts too
        if self._media_encoder is not None:
            self._media_encoder.adapts([slot for slot, each in self._engine.bank.slots.items() if each.adapts_tower])
        self._adapter_bytes = self._live.now + self._packed - self._base_bytes
        self._optimizer_bytes: int | None = None

    def _build(
        self,
        settings: ModelConfig,
        config: Any,
        jobs: Sequence[PlannedJob],
        keep: Sequence[int] | None,
        layout: str | None,
    ) -> Base:
        model, wrapper = skeleton(settings, config, self._device)
        if keep is not None:
            keep_layers(model, keep)
            model.get_input_embeddings().register_forward_hook(_with_gradient)
        train_what_is_trained(model, jobs)
        model.eval()
        self._packed = sum(fake_packed_weights(model, settings.storage).values())
        fake_experts(model)
        spread_evenly(model)  # the test below is a pass already
        base = Base(model, None, settings.path, settings.revision)
        base.layer_wrapper = wrapper
        base.prompt_type = prompt_type_of(model)
        base.set_layout(layout or "packed")
        if layout is None and (settings.attention == "padded" or not self._takes_boundaries(base)):
            base.set_layout("padded")
        base.shift_attn = settings.shift_attn
        return base

    def _takes_boundaries(self, base: Base) -> bool:
        """The leak test needs weights; this much shows without."""
        segment = Segment(np.zeros(4, np.int64), np.zeros(4, np.float32))
        try:
            with torch.no_grad():
                base.hidden(pack([(BASE_SLOT, segment)]).moved(self._move), training=True)
        except BoundariesMissing:
            return False
        return True

    def _add(self, job: PlannedJob, seed: int) -> int:
        slot = BASE_SLOT if job.adapter is None else self._engine.bank.add(job.adapter, seed=seed)
        at_once = job.optimizer.model_copy(update={"layerwise": False})
        self._engine.add(slot, job.objective, at_once, seed, job.neftune_alpha)
        if job.optimizer.layerwise:
            self._drop_gradients_as_they_come()
        return slot

    def _drop_gradients_as_they_come(self) -> None:
        """As layer-wise updates do; what the optimizer keeps is found out in a step of its own."""
        masters = self._engine.jobs[BASE_SLOT].parameters
        for name, weight in self.base.model.named_parameters():  # a value head is small
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda _, name=name: setattr(masters[name], "grad", None))

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._mode.from_tensor(tensor).to(self._device)

    def heaviest_batches(self, work: StepSegments, micro_batch_tokens: int) -> list[Heaviest]:
        """Of a step that is cut so, the forward pass with the most tokens (of several the last, since gradients of
        passes before it are there); and the one with the most of those behind it, which find more gradients."""
        self._engine.micro_batch_tokens = micro_batch_tokens
        batches = self._engine.micro_batches(work)
        tokens = [self.base.padded_tokens(batch.lengths) for batch in batches]
        places = [_last_largest(tokens)]
        if places[0] + 1 < len(batches):
            places.append(places[0] + 1 + _last_largest(tokens[places[0] + 1 :]))
        found = []
        for place in places:
            # gradients behind the second as well: what is behind that one is not looked at by itself
            earlier = batches[:place] if place == places[0] else [*batches[:place], *batches[place + 1 :]]
            slots = frozenset(slot for batch in earlier for slot in batch.slots)
            ahead, shared = (
                (self._ahead(work, batches, place), self._shared(batches, place)) if self._media_encoder else ((), ())
            )
            found.append(Heaviest(batches[place], len(batches), slots, ahead, shared))
        return found

    def _ahead(self, work: StepSegments, batches: Sequence[Batch], place: int) -> tuple[Media, ...]:
        """Whose pictures come after the pass at `place`: those of the pass behind it, and those of later ones that were
        there already; of the last one, the next step's."""
        if place + 1 < len(batches):
            there = {media.items for batch in batches[: place + 1] for _, media in batch.media}
            again = [media for batch in batches[place + 2 :] for _, media in batch.media if media.items in there]
            return _each_once([*(media for _, media in batches[place + 1].media), *again])
        coming = [each.media for segments in work.values() for each in segments if each.media is not None]
        return _each_once(coming)[:DOCUMENTS_AHEAD]

    def _shared(self, batches: Sequence[Batch], place: int) -> tuple[Media, ...]:
        """Of whose pictures the bare tower has spoken when the pass at `place` runs, and later passes want it."""
        bare = {slot for slot, each in self._engine.bank.slots.items() if not each.adapts_tower} | {BASE_SLOT}
        own = [[media for index, media in batch.media if batch.slots[index] in bare] for batch in batches]
        later = {media.items for each in own[place + 1 :] for media in each}
        return _each_once([media for each in own[: place + 1] for media in each if media.items in later])

    def step(self, heaviest: Heaviest, activation_checkpointing: str | int) -> StepTrace:
        """What the engine does with one forward pass, and then the optimizers, with nothing to read."""
        set_activation_checkpointing(self.base.model, activation_checkpointing)
        engine, live = self._engine, self._live
        ready, pixels = self._ready(heaviest)
        before, peaks = live.now, Peaks(live, self._media_encoder)
        with _torch_keeps_quiet(), self._mode, live, KnownValues() if ready.batch.pixels else contextlib.nullcontext():
            self._leave_gradients(heaviest.others)
            earlier = live.now - before
            engine.passes.trace(ready, peaks)
            self._leave_gradients(set(engine.jobs) - {BASE_SLOT})
        gradients = live.now - before
        optimizer = self._optimizer_state()
        for job in engine.jobs.values():
            job.optimizer.zero_grad(set_to_none=True)
        kept = peaks.after_forward - before - earlier
        forward, loss, backward = (peak - before for peak in peaks.bytes)
        kept_by_tower, tower, tower_backward = (
            self._media_encoder.seen(before) if self._media_encoder is not None else (0, 0, 0)
        )
        static = (self._base_bytes, self._adapter_bytes, optimizer)
        own = (pixels, kept_by_tower, tower, tower_backward)
        return StepTrace(*static, gradients, earlier, kept, forward, loss, backward, *own)

    def _ready(self, heaviest: Heaviest) -> tuple[PreparedPass, int]:
        """The pass on fake tensors, and the bytes of the pixels that are there during it."""
        batch, media_encoder = heaviest.batch, self._media_encoder
        if media_encoder is not None:
            media_encoder.begin()
        if media_encoder is None or not batch.media:
            return self._engine.passes.prepare(dataclasses.replace(batch, media=())).moved(self._move), 0
        shown = _each_once([media for _, media in batch.media])
        pixels = media_encoder.bytes_of(shown, heaviest.ahead if self._device.type == "cpu" else ())
        known = {media.items: media_encoder.blank(media) for media in shown}
        prepared = self._engine.passes.prepare(media_encoder.ready(batch, known))
        ready = prepared.moved(lambda tensor: with_values(self._mode, tensor, self._device))
        with self._mode, self._live, KnownValues(), torch.no_grad(), self._engine.bank.routing.using(ready.context):
            # the first time, families make what they keep for good
            media_encoder.options(ready.batch, ready.batch.token_T[None])
            pixels += media_encoder.bytes_of_features(heaviest.shared)
        media_encoder.begin()
        return ready, pixels

    def _leave_gradients(self, slots: Collection[int]) -> None:
        """As forward passes of these slots do, where there are none yet."""
        for slot in slots:
            for parameter in self._engine.jobs[slot].parameters.values():
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)

    def _optimizer_state(self) -> int:
        """Bytes of all optimizers' state, found by one step of each; the gradients are there."""
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


def _last_largest(numbers: Sequence[int]) -> int:
    """Its place."""
    return max(range(len(numbers)), key=lambda place: (numbers[place], place))


def _each_once(documents: Sequence[Media]) -> tuple[Media, ...]:
    """Documents, those with the same media once."""
    return tuple({media.items: media for media in documents}.values())


def skeleton(settings: ModelConfig, config: Any, device: torch.device) -> tuple[Any, Any]:
    """The model without weights, its blocks as they will be trained, and what wraps its layers, if anything does. Under
    a FakeTensorMode."""
    with quiet_transformers(), torch.device(device), no_init_weights():
        model = model_class(config).from_config(
            config, dtype=choose_dtype(settings, device), trust_remote_code=settings.runs_own_code
        )
    model.tie_weights()
    if settings.memory_efficient_modules:
        with unset_fake_temporarily():
            use_memory_efficient_fakes(model)
    return model, wrapped_as_planned(model, settings.layer_wrapper)


def _with_gradient(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """The first layer stands for others here, which have a gradient to hand down."""
    del module, args
    return output.requires_grad_() if torch.is_grad_enabled() and output.is_leaf else output


def train_what_is_trained(model: Any, jobs: Sequence[PlannedJob]) -> None:
    """Set `requires_grad` of the base's own parameters."""
    model.requires_grad_(False)
    for job in jobs:
        if job.adapter is None and job.freeze is not None:
            train_only(model, job.freeze)
        elif job.adapter is None:
            train_everything(model)


@contextlib.contextmanager
def _torch_keeps_quiet() -> Generator[None, None, None]:
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
    check_path(locate(config.path))
    with quiet_transformers(), hub_or_cache(locate(config.path), config.revision):
        try:
            found = transformers.AutoConfig.from_pretrained(
                locate(config.path), revision=config.revision, trust_remote_code=config.runs_own_code
            )
            stretch(found, config.rope_scaling)
            return found
        except Exception as error:  # whatever transformers makes of somebody's file
            raise ModelError(cannot_load("the configuration", config, error)) from error


def work_of(slots: Sequence[int], jobs: Sequence[PlannedJob]) -> Mapping[int, Sequence[Segment]]:
    """The heaviest step of every job, together."""
    return {slot: job.step for slot, job in zip(slots, jobs)}
