"""What the engine keeps for a job, and what it says about a step."""

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
    """What the engine keeps for one job: what it trains, how, and how far it is."""

    objective: Objective
    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: OptimizerConfig
    refresh: Callable[[], None]
    """Brings what computes up to date with `parameters`, after each update."""
    num_steps: int | None
    """Optimizer steps it will take; None: not known, and adapters with a schedule of their own stay as they are."""
    seed: int
    neftune_alpha: float = 0.0
    value_D: torch.nn.Parameter | None = None
    """The value head, for an objective that needs one; also among `parameters`."""
    scale: LossScale | None = None
    """What its losses are multiplied by in the backward pass, where gradients would underflow."""
    layerwise: LayerwiseUpdates | None = None
    """Where updates happen within the backward pass."""
    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    loss_is_finite: bool = True
    """Of every forward pass since the last optimizer step."""


@dataclass(frozen=True)
class RowLosses:
    """What each held-out row adds to a loss, and how much it counts in it (tokens, pairs): both as long as there are
    rows, in the order of the data. The losses' sum is the loss."""

    shares: tuple[float, ...]
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Forwarded:
    """What one job's step gave before the update."""

    loss: float
    tokens: int
    totals: Totals
    metrics: dict[str, float] = field(default_factory=dict)
    rows: RowLosses | None = None
    """Of an evaluation that was asked for them."""


@dataclass(frozen=True)
class Updated:
    """What the update did. `skipped`: loss or gradient was not finite and nothing was changed (a gradient under
    `layerwise`: its own parameter was not)."""

    grad_norm: float
    skipped: bool
    loss_scale: float | None = None
    """It was skipped because scaled float16 gradients overflowed; the scale from now on."""
