"""When jobs in the same passes are faster than one after another: a model of a step's time, fitted to measurements.

A pass costs something whatever is in it (unpacking weights, reading them, starting kernels), so much for each token,
and each job adds a little of its own (its products of rank r, its optimizer step). Together jobs share the first.
`benchmarks/fused_jobs.py` checks the model by measurements that it was not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: `per_pass` for each forward and backward pass, `per_token`, and `per_job`."""

    per_pass: float
    per_token: float
    per_job: float

    def of(self, tokens: Sequence[float], micro_batch_tokens: int) -> float:
        """Seconds of one optimizer step of jobs with these tokens, in the same passes."""
        total = sum(tokens)
        passes = max(1, math.ceil(total / micro_batch_tokens))
        return passes * self.per_pass + total * self.per_token + len(tokens) * self.per_job

    def times_faster(self, tokens: Sequence[float], micro_batch_tokens: int) -> float:
        """A step of each job one after another, over one of all of them."""
        return sum(self.of([own], micro_batch_tokens) for own in tokens) / self.of(tokens, micro_batch_tokens)


def fitted(alone: tuple[float, float], large: tuple[float, float], together: tuple[int, float, float]) -> StepTime:
    """From one pass each: `alone` and `large`, `(tokens, seconds)` of one job; `together`, `(jobs, tokens, seconds)`.

    What a disturbed clock makes negative is 0.
    """
    (few, short), (many, long), (jobs, tokens, seconds) = alone, large, together
    per_token = max(0.0, (long - short) / (many - few)) if many > few else 0.0
    of_jobs = seconds - short - (tokens - few) * per_token
    per_job = max(0.0, of_jobs / (jobs - 1)) if jobs > 1 else 0.0
    return StepTime(max(0.0, short - few * per_token - per_job), per_token, per_job)
