"""The plan of a run's memory: its parts, its peak, and whether the machine has it.

Tensors are counted by simulation (memory.py). What a process takes beside them on a CPU (Python and its libraries,
the allocator's fragments, weights being read) is measured or follows from the sizes; benchmarks/memory_plan.py holds
the sum against real peaks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lowrank.kernels.shape_bucketing import needs_bucketing
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import choose_device, choose_dtype, locate
from lowrank.planning.compiled import growth
from lowrank.planning.machine import Machine, this_machine
from lowrank.planning.memory import PlannedMedia, StepBytes, StepMemory
from lowrank.planning.placed import REPLICATED
from lowrank.report.formatting import gigabytes

_LIBRARIES = 65 << 20
"""What a process still loads and keeps between the plan and the end of the run: the model's code, oneDNN's compiled
kernels, matplotlib. Measured (docs/log.md)."""
_IDLE_LOSS, _IDLE_LOSS_MOST = 2.4, 190 << 20
_IDLE_WORKSPACE, _IDLE_WORKSPACE_MOST = 2.8, 260 << 20
"""A CPU's allocator keeps so many times the temporaries of the peak in pieces that nothing fits into, up to a bound.
Fitted to measured peaks (docs/log.md), not derived."""
_SEVERAL, _SEVERAL_OF_PASS = 100 << 20, 0.25
"""Where a step is cut into passes, gradients of the earlier ones lie between the pieces: so many bytes more, and so
much of what a pass holds. Fitted as well."""
MARGIN = 0.95
"""A run is said to fit if it needs at most this share of what is free."""


_POLICIES = {
    "none": "activations are kept",
    "selective": "layers are computed again, but for their attention",
    "full": "layers are computed again",
    "sqrt": "layers are computed up to twice again",
    "offload": "activations go to host memory",
}
"""What each policy of activation checkpointing does."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, on the device that computes. `available` counts what this process holds already."""

    step: StepBytes
    process: int
    """Python, libraries, data, the allocator's fragments. On a GPU: 0, it is in host memory."""
    resident: int
    """What this process held when the plan was made; a part of `process`."""
    loading: int
    """The peak while the weights are read."""
    available: int
    device: str
    layout: str
    micro_batch_tokens: int
    activation_checkpointing: str | int
    forward_passes: int
    """Per optimizer step of all jobs together, in the heaviest."""
    pictures: PlannedMedia | None = None
    """Of the heaviest forward pass."""

    @property
    def peak(self) -> int:
        """The most the run needs at any moment."""
        return max(self.step.total + self.process, self.loading)

    @property
    def fits(self) -> bool:
        """With a margin for what a plan cannot know."""
        return self.peak <= MARGIN * self.available

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            **dataclasses.asdict(self),
            "peak": self.peak,
            "fits": self.fits,
        }


class Planner:
    """Plans of one run under different cuts and activation checkpointing."""

    def __init__(self, model: ModelConfig, memory: StepMemory, machine: Machine | None = None) -> None:
        self.memory = memory
        self.device = choose_device(model)
        self.machine = machine or this_machine(self.device)
        self.own_memory = self.machine.device is not None
        """The device has memory beside the host's."""
        self._file_bytes = weight_file_bytes(model)
        self._dtype = choose_dtype(model, self.device)
        self._resident = psutil.Process().memory_info().rss

    def total(self, step: StepBytes, passes: int = 1, micro_batch_tokens: int | None = None) -> int:
        """What a step needs, with the process around it where that is in the same memory; with `micro_batch_tokens`,
        by the end of the run."""
        if self.own_memory:
            return step.total
        grown = 0
        if micro_batch_tokens is not None and needs_bucketing(self.device, self._dtype):
            grown = growth(self.memory.jobs, micro_batch_tokens)
        return step.total + beside_tensors(self._resident, step, passes) + grown

    def of(self, model: ModelConfig, memory: StepMemory) -> Planner:
        """The same for another base or other jobs."""
        return Planner(model, memory, self.machine)

    def plan(self, micro_batch_tokens: int, activation_checkpointing: str | int) -> MemoryPlan:
        """With these two settings."""
        step = self.memory.step(micro_batch_tokens, activation_checkpointing)
        passes = self.memory.heaviest_batch(micro_batch_tokens).passes
        on_host = not self.own_memory
        process = self.total(step, passes, micro_batch_tokens) - step.total
        loading = self._resident + _LIBRARIES // 2 + step.base + self._file_bytes if on_host else step.base
        if self.memory.placed.base != REPLICATED:  # layer by layer, each whole until it is put in its place
            loading = step.base + self.memory.parts.largest_layer + (self._resident + _LIBRARIES // 2 if on_host else 0)
        available = self.machine.host if self.machine.device is None else self.machine.device
        return MemoryPlan(
            step,
            process,
            self._resident,
            loading,
            available,
            str(self.device),
            self.memory.layout,
            micro_batch_tokens,
            activation_checkpointing,
            passes,
            self.memory.pictures(micro_batch_tokens, activation_checkpointing),
        )


def beside_tensors(resident: int, step: StepBytes, passes: int) -> int:
    """What the process has in host memory beside tensors at the peak of a step: what it held before (`resident`),
    libraries still to come, idle heap."""
    idle = min(_IDLE_LOSS_MOST, _IDLE_LOSS * step.loss) + min(_IDLE_WORKSPACE_MOST, _IDLE_WORKSPACE * step.workspace)
    if passes > 1:
        idle += _SEVERAL + _SEVERAL_OF_PASS * (step.activations + step.loss + step.workspace)
    return int(resident + _LIBRARIES + idle)


def weight_file_bytes(model: ModelConfig) -> int:
    """Bytes of the model's safetensors files here, which are mapped while they are read; 0 for a hub name."""
    folder = Path(locate(model.path))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0


def describe_activation_checkpointing(activation_checkpointing: str | int) -> str:
    """What a policy does."""
    return (
        f"the first {activation_checkpointing} layers are computed again"
        if isinstance(activation_checkpointing, int)
        else _POLICIES[activation_checkpointing]
    )


def describe_planned_media(pictures: PlannedMedia) -> str:
    """What they take, in a sentence."""
    share = f"{pictures.tokens:,} of the {pictures.tokens_of_pass:,} tokens"
    return (
        f"{share} of the heaviest forward pass stand for {pictures.names} ({pictures.number:,}); the tower for them "
        f"takes {gigabytes(pictures.tower)} of the base, and {gigabytes(pictures.looking)} while it is at work"
    )


def one_line(plan: MemoryPlan) -> str:
    """What a run says before it loads."""
    where = "memory" if plan.device == "cpu" else f"memory of {plan.device}"
    return (
        f"needs about {gigabytes(plan.peak)} of {gigabytes(plan.available)} free {where}; forward passes of up to "
        f"{plan.micro_batch_tokens:,} tokens, {describe_activation_checkpointing(plan.activation_checkpointing)}"
    )
