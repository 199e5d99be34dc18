"""The memory of a run's optimizer steps, part by part, for any cut and any activation checkpointing.

Decoder layers of one kind add the same to every number, so a model with one layer of each kind is simulated,
and one with a second layer of each kind; the rest is multiplication.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.adapters.config import AdapterSettings
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.checkpointing.activation_checkpointing import segment_length
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.models.positions import positions_of
from lowrank.planning.base_bytes import base_bytes
from lowrank.planning.peaks import StepTrace
from lowrank.planning.pictures import MediaTraceCache
from lowrank.planning.placed import Placed
from lowrank.planning.simulation import (
    Heaviest,
    PlannedJob,
    Simulation,
    read_config,
    work_of,
)
from lowrank.records import KIND_NAMES
from lowrank.segments import Media
from lowrank.train.lanes import heaviest_lane
from lowrank.train.micro_batching import StepSegments

_FEW = 3
"""A model of so many layers is simulated whole."""


@dataclass(frozen=True)
class StepBytes:
    """Where the memory of a training step goes, on the device that computes; the sum is the peak of all tensors."""

    base: int
    adapters: int
    """Float32 masters and the copies that compute (`tuning: full`: the masters)."""
    optimizer: int
    gradients: int
    activations: int
    """Kept between forward and backward pass."""
    loss: int
    """Log-probabilities, where the peak is there."""
    workspace: int
    """Temporaries of attention, dequantization and everything else at the peak."""
    pixels: int = 0
    """Pictures made ready for the tower: on a GPU those of the pass, in host memory those of the next as well; and what
    the tower has said of some that later passes of the step show again."""

    @property
    def total(self) -> int:
        """Bytes of all tensors at the worst moment."""
        return sum(dataclasses.asdict(self).values())

    @property
    def static(self) -> int:
        """What is alive between steps."""
        return self.base + self.adapters + self.optimizer


@dataclass(frozen=True)
class PlannedMedia:
    """What pictures, videos and sounds take of a run's heaviest forward pass."""

    number: int
    tokens: int
    """That stand for them."""
    tokens_of_pass: int
    tower: int
    """Bytes of the weights of tower and projector; a part of the base."""
    looking: int
    """Bytes at the most while the tower looks, or listens."""
    names: str = "pictures"
    """What they are, for people."""


class StepMemory:
    """Simulated steps of one run, remembered."""

    def __init__(
        self, model: ModelConfig, jobs: Sequence[PlannedJob], lanes: int = 1, placed: Placed | None = None
    ) -> None:
        """`lanes`: parts in which a step is computed, of which the heaviest is meant then. `placed`: how the base is
        kept; left out: whole on the device."""
        self.jobs = tuple(jobs)
        self.model = model
        self.lanes = lanes
        self.placed = placed or Placed()
        self.config = read_config(model)
        self.parts = base_bytes(model, self.config)
        self.processor = _processor_for(model, self.jobs)
        """Of the pictures in the jobs' steps; None where there are none."""
        self._pictures = MediaTraceCache()
        self.kinds = list(self.parts.kinds)
        self.num_layers = len(self.kinds)
        self.max_length: int | None = positions_of(self.config)
        """The longest document the model was made for, where its config.json says."""
        self._simulations: dict[tuple[int, ...] | None, Simulation] = {}
        self._traces: dict[Any, StepTrace] = {}
        self._known_layout: str | None = None
        first = self._simulation(self.cores()[0])  # with one layer of each kind: no other can refuse the boundaries
        self.layout = self._known_layout = first.base.layout
        self.work: StepSegments = heaviest_lane(work_of(first.slots, self.jobs), lanes)

    def heaviest_batch(self, micro_batch_tokens: int, work: StepSegments | None = None) -> Heaviest:
        """The largest forward pass of a step."""
        return self._heaviest(micro_batch_tokens, work)[0]

    def _heaviest(self, micro_batch_tokens: int, work: StepSegments | None) -> list[Heaviest]:
        return self._simulation(self.cores()[0]).heaviest_batches(work or self.work, micro_batch_tokens)

    def step(
        self, micro_batch_tokens: int, activation_checkpointing: str | int, work: StepSegments | None = None
    ) -> StepBytes:
        """The heaviest step of all jobs together (or `work`), cut and recomputed so."""
        traces = [self._policy(each, activation_checkpointing) for each in self._heaviest(micro_batch_tokens, work)]
        steps = [_parts(self.placed.moved(trace, self.parts)) for trace in traces]
        return max(steps, key=lambda step: step.total)

    def pictures(self, micro_batch_tokens: int, activation_checkpointing: str | int) -> PlannedMedia | None:
        """What pictures take of the heaviest step; None where there are none."""
        if self.processor is None:
            return None
        heaviest = self.heaviest_batch(micro_batch_tokens)
        spans = [span for _, media in heaviest.batch.media for span in media.spans]
        tokens = sum(end - first for first, end in spans)
        looking = self._policy(heaviest, activation_checkpointing).tower
        kinds = {each.kind: KIND_NAMES[each.kind] for _, media in heaviest.batch.media for each in media.inside}
        names = " and ".join(kinds[kind] for kind in sorted(kinds)) or "pictures"
        return PlannedMedia(len(spans), tokens, heaviest.batch.num_tokens, self.parts.tower, looking, names)

    def gradients(self, micro_batch_tokens: int, activation_checkpointing: str | int) -> int:
        """Bytes of all gradients at the end of a step, also where its peak is before they are there."""
        return self._policy(self.heaviest_batch(micro_batch_tokens), activation_checkpointing).gradients

    def placed_as(self, placed: Placed) -> StepMemory:
        """The same run with the base kept otherwise; what was simulated is known to both."""
        other = copy.copy(self)
        other.placed = placed
        return other

    def _policy(self, batch: Heaviest, activation_checkpointing: str | int) -> StepTrace:
        """`sqrt` and a number of layers follow from `full` and `none`."""
        if isinstance(activation_checkpointing, int):
            return self._first_layers(batch, min(activation_checkpointing, self.num_layers))
        if activation_checkpointing != "sqrt":
            return self._whole(batch, activation_checkpointing)
        full = self._whole(batch, "full")
        length = segment_length(self.num_layers)
        each = (full.kept - full.tower_kept) // max(1, self.num_layers)
        spared = each * (self.num_layers + -self.num_layers // length)
        phases = {name: getattr(full, name) - spared for name in ("kept", "forward", "loss")}
        segment = each * (length - 1)  # the inputs of the segment that is computed again
        phases["kept"] += segment
        return dataclasses.replace(full, **phases, backward=min(full.backward, full.backward - spared + segment))

    def _first_layers(self, batch: Heaviest, number: int) -> StepTrace:
        none, full = self._whole(batch, "none"), self._whole(batch, "full")
        tower = none.tower_kept - full.tower_kept  # which stays: its layers are computed again with all others alone
        spared = (none.kept - full.kept - tower) * number // max(1, self.num_layers)
        phases = {name: getattr(none, name) - spared for name in ("kept", "forward", "loss", "backward")}
        phases["backward"] = max(phases["backward"], full.backward + tower)
        return dataclasses.replace(none, **phases)

    def _whole(self, batch: Heaviest, activation_checkpointing: str) -> StepTrace:
        """A step of the whole model out of steps of models of a few layers."""
        first, others = self.cores()
        trace = self._trace(first, batch, activation_checkpointing)
        if first is None:
            return trace
        result = trace
        for kind, core in others.items():
            more = self._trace(core, batch, activation_checkpointing).plus(trace, -1)
            result = result.plus(more, self.kinds.count(kind) - 1)
        return result

    def cores(self) -> tuple[tuple[int, ...] | None, dict[int, tuple[int, ...]]]:
        """The layers of the models that are simulated: one of each kind; and by kind, that with a second of the kind.

        (None, {}): all layers.
        """
        kinds = sorted(set(self.kinds))
        if self.num_layers <= _FEW or len(kinds) > self.num_layers // 2 or any(map(_names_layers, self.jobs)):
            return None, {}
        of_kind = {kind: [index for index, each in enumerate(self.kinds) if each == kind] for kind in kinds}
        seconds = {kind: tuple(sorted([*kinds, places[1]])) for kind, places in of_kind.items() if len(places) > 1}
        return tuple(kinds), seconds

    def _simulation(self, core: tuple[int, ...] | None) -> Simulation:
        if core not in self._simulations:
            self._simulations[core] = Simulation(
                self.model, self.config, self.jobs, core, self._known_layout, self.processor, self._pictures
            )
        return self._simulations[core]

    def _sizes(self, media: Media) -> Any:
        return self.processor.sizes(media.items) if self.processor is not None else ()

    def _trace(self, core: tuple[int, ...] | None, heaviest: Heaviest, activation_checkpointing: str) -> StepTrace:
        batch = heaviest.batch
        key = (
            core,
            batch.lengths,
            batch.prefixes,
            batch.slots,
            heaviest.others,
            int((batch.weight_T != 0).sum()),
            activation_checkpointing,
            tuple((index, media.spans, media.before, self._sizes(media)) for index, media in batch.media),
            tuple(map(self._sizes, heaviest.ahead)),
            tuple(map(self._sizes, heaviest.shared)),
        )
        if key not in self._traces:
            self._traces[key] = self._simulation(core).step(heaviest, activation_checkpointing)
        return self._traces[key]


def _parts(trace: StepTrace) -> StepBytes:
    """The peak of a step, and what it consists of."""
    phases = {name: getattr(trace, name) for name in ("forward", "loss", "backward", "tower", "tower_backward")}
    where = max(phases, key=lambda name: phases[name])
    activations = min(trace.tower_kept if where.startswith("tower") else trace.kept, phases[where])
    rest = phases[where] - activations
    gradients = min(trace.gradients if where.endswith("backward") else trace.earlier, rest)
    rest -= gradients
    loss = rest if where == "loss" else 0
    static = (trace.base, trace.adapters, trace.optimizer)
    return StepBytes(*static, gradients, activations, loss, rest - loss, trace.pixels)


def _processor_for(model: ModelConfig, jobs: Sequence[PlannedJob]) -> MediaProcessor | None:
    if all(segment.media is None for job in jobs for segment in job.step):
        return None
    return processor_of(load_tokenizer(model))


def _names_layers(job: PlannedJob) -> bool:
    """Whether its adapter treats layers by their number, so that no layer can stand for another."""
    adapter: AdapterSettings | None = job.adapter
    if adapter is None:
        return job.freeze is not None
    patterns = [*adapter.rank_pattern, *adapter.alpha_pattern, *adapter.modules_to_save]
    for given in (adapter.target_modules, adapter.exclude_modules):
        patterns += [given] if isinstance(given, str) else given
    return any(re.search(r"(^|[.\[(|])\d", pattern) for pattern in patterns)
