"""One job's optimizer step: unscale, check, clip, update. And the weights with which a job is evaluated."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Sequence

import torch

from lowrank.train.optimizers import HasEvalWeights, set_learning_rate
from lowrank.train.trained_job import TrainedJob, UpdateResult


def update(job: TrainedJob, learning_rate: float, after_update: Callable[[], None]) -> UpdateResult:
    """Update a job's parameters from its gradients, clipped to its own norm, and clear them. `after_update` is called
    where they have changed, before what computes is brought up to date.

    A loss or gradient that is not finite leaves parameters and optimizer state as they were; a gradient under
    `layerwise`, its own parameter's only.
    """
    job.step += 1
    gradients = [parameter.grad for parameter in job.parameters.values() if parameter.grad is not None]
    if job.scale is not None and gradients:
        torch._foreach_mul_(gradients, 1.0 / job.scale.value)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
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
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        set_learning_rate(job.optimizer, learning_rate)
        job.optimizer.step()
        after_update()
        job.refresh()
    job.optimizer.zero_grad(set_to_none=True)
    return UpdateResult(norm, not finite, job.scale.value if overflow and job.scale else None)


@contextlib.contextmanager
def eval_weights(jobs: Sequence[TrainedJob]) -> Generator[None, None, None]:
    """Context in which the parameters of `jobs` have the values that are evaluated and saved: an optimizer that
    averages its steps (schedule-free) puts the average in place. Afterwards all is restored to the bit."""
    averaging = [(job, job.optimizer) for job in jobs if isinstance(job.optimizer, HasEvalWeights)]
    before = [{name: value.detach().clone() for name, value in job.parameters.items()} for job, _ in averaging]
    for job, optimizer in averaging:
        optimizer.eval()
        job.refresh()
    try:
        yield
    finally:
        for (job, optimizer), values in zip(averaging, before):
            optimizer.train()
            for name, parameter in job.parameters.items():
                parameter.detach().copy_(values[name])
            job.refresh()
