"""Training state of one job, and the results of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lowrank.batches import Totals
from lowrank.objectives import Objective
from lowrank.train.layerwise import LayerwiseUpdates
from lowrank.train.loss_scale import LossScale
from lowrank.train.optimizers import OptimizerConfig


@dataclass
class TrainedJob:
    """Training state that the engine keeps for one job: parameters, optimizer, and the number of steps taken."""

    objective: Objective
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: OptimizerConfig
    refresh: Callable[[], None]
    """Called after each update; copies `parameters` to where the forward pass reads them."""
    num_steps: int | None
    """Optimizer steps in all; None: unknown, and adapters with a schedule of their own (AdaLoRA) do not advance it."""
    seed: int
    neftune_alpha: float = 0.0
    value_D: torch.nn.Parameter | None = None
    """The value head, for an objective that needs one; also among `parameters`."""
    scale: LossScale | None = None
    """Loss scaling for float16, where gradients would underflow; None: none."""
    layerwise: LayerwiseUpdates | None = None
    """Set where updates happen within the backward pass (`optimizer.layerwise`)."""
    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    loss_is_finite: bool = True
    """Whether the loss of every forward pass since the last optimizer step was finite."""


@dataclass(frozen=True)
class RowLosses:
    """The loss of a job's held-out rows, row by row, in the order of the data."""

    loss_terms: tuple[float, ...]
    """What each row adds to the loss: their sum is the loss."""
    counts: tuple[float, ...]
    """How much each row counts in the loss: its tokens, or 1 for a pair."""


@dataclass(frozen=True)
class ForwardResult:
    """Loss and metrics of one job from the forward passes of a step or an evaluation. `tokens`: all tokens that went
    through; `totals`: what the loss was divided by."""

    loss: float
    tokens: int
    totals: Totals
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowLosses | None = None
    """Of evaluations where `by_row` names the job."""


@dataclass(frozen=True)
class UpdateResult:
    """Result of one job's optimizer update. `skipped`: loss or gradient was not finite, so nothing was changed (under
    `layerwise`: not the parameter whose gradient it was)."""

    grad_norm: float
    skipped: bool
    loss_scale: float | None = None
    """The new loss scale, where the update was skipped because scaled float16 gradients overflowed; else None."""
