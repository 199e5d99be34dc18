"""What a loss curve says in plain words: the answer to "when do I stop?"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lowrank.train import wording
from lowrank.train.curve import noise_of, smooth

Kind = Literal["falling", "flat", "overfitting", "diverged", "too_short"]

MIN_LOSSES = 12
"""Fewer finite training losses say nothing."""
MIN_EVALS = 8
"""From this many evaluations on, the held-out curve decides between falling and flat."""
MATERIAL = 0.01
"""Changes below this share, of the loss and of its whole fall, do not matter to anybody."""


@dataclass(frozen=True)
class Verdict:
    """`step`: since when it is flat or diverged, or, where it overfits, the best one."""

    kind: Kind
    sentence: str
    step: int | None = None


def verdict(steps: Sequence[int], losses: Sequence[float], eval_points: Sequence[tuple[int, float]] = ()) -> Verdict:
    """Judge a training curve (nats per token at ascending steps) and held-out `(step, loss)` points.

    The rules, in order; levels are of the smoothed curve (`curve.smooth`), noise is `curve.noise_of`:

    1. diverged: of the last three losses at least two are not finite; or the curve ends above its lowest
       level by more than 25 % of its whole fall, 10 % of that level, and 6 standard errors.
    2. overfitting: the best held-out loss is at step b, at least two evaluations came after it, the last
       two are both worse, and their mean is worse than the level around b by more than 1 % and 4 standard
       errors.
    3. too short: fewer than 12 finite losses, and fewer than 8 evaluations.
    4. falling: over the last third (of fewer than 30 points: the last 10, at most half), the Theil-Sen slope
       is negative with 97.5 % confidence (Mann-Kendall), and the fall it makes is more than 1 % of the loss
       and 1 % of its whole fall. Judged on the held-out curve if there are at least 8 evaluations, since
       learning that helps nobody is no reason to go on; else on the training curve.
    5. flat otherwise, since the first step from which the curve stayed in a band around its end level: that
       1 %, widened by 3 standard errors. Where a fall of 3 times that 1 % would drown in the noise, the
       sentence says so and gives no advice.
    """
    order = sorted(range(len(steps)), key=lambda index: steps[index])
    x_N = np.array([steps[index] for index in order], dtype=np.float64)
    y_N = np.array([losses[index] for index in order], dtype=np.float64)
    held_out = [(step, loss) for step, loss in sorted(eval_points) if math.isfinite(loss)]
    finite = int(np.isfinite(y_N).sum())
    found = _not_finite(x_N, y_N) or (_risen(x_N, y_N) if finite >= MIN_LOSSES else None) or _overfitting(held_out)
    if found:
        return found
    if len(held_out) >= MIN_EVALS:
        points = np.array(held_out)
        said = _course(points[:, 0], points[:, 1], "held-out loss", as_measured=True)
        return _with_held_out(said, held_out) if said.kind == "flat" else said
    if finite < MIN_LOSSES:
        what = f"{finite} {'loss' if finite == 1 else 'losses'}"
        return Verdict("too_short", f"Too short to say: {what}, at least {MIN_LOSSES} are needed.")
    known_N = np.isfinite(y_N)
    return _with_held_out(_course(x_N[known_N], y_N[known_N], "training loss"), held_out)


def _not_finite(x_N: np.ndarray, y_N: np.ndarray) -> Verdict | None:
    bad_N = ~np.isfinite(y_N)
    if len(y_N) == 0 or bad_N[-3:].sum() < min(2, len(y_N)):
        return None
    good = np.flatnonzero(~bad_N)
    since = int(x_N[min(good[-1] + 1, len(x_N) - 1)] if len(good) and bad_N[-1] else x_N[np.flatnonzero(bad_N)[0]])
    advice = "A lower learning rate or a longer warmup may help."
    return Verdict("diverged", f"Diverged: the loss is not a finite number since step {since}. {advice}", since)


def _risen(x_N: np.ndarray, y_N: np.ndarray) -> Verdict | None:
    known_N = np.isfinite(y_N)
    x_N, y_N = x_N[known_N], y_N[known_N]
    level_N, noise = smooth(y_N), noise_of(y_N)
    lowest = int(np.argmin(level_N))
    tail = y_N[-max(3, len(y_N) // 10) :]
    end, low = float(np.median(tail)), float(level_N[lowest])
    fall = max(0.0, float(level_N[0]) - low)
    error = noise * math.sqrt(1 / len(tail) + 1 / _effective(len(y_N)))
    if lowest >= len(y_N) - 2 or end - low <= max(0.25 * fall, 0.10 * abs(low), 6 * error):
        return None
    since = int(x_N[lowest])
    return Verdict(
        "diverged",
        f"Diverged: the training loss rose from {wording.loss(low)} around step {since} to {wording.loss(end)}. "
        "A lower learning rate may help.",
        since,
    )


def _overfitting(held_out: Sequence[tuple[int, float]]) -> Verdict | None:
    if len(held_out) < 3:
        return None
    loss_E = np.array([loss for _, loss in held_out])
    best = int(np.argmin(loss_E))
    if best > len(loss_E) - 3:
        return None
    around, tail = loss_E[max(0, best - 1) : best + 2], loss_E[-2:]
    rise = float(tail.mean() - np.median(around))
    # With few points curvature looks like noise, so the estimate only counts once there are enough.
    noise = noise_of(loss_E) if len(loss_E) >= 6 else 0.0
    error = noise * math.sqrt(1 / 2 + 1 / 3)
    if tail.min() <= loss_E[best] or rise <= max(MATERIAL * abs(loss_E[best]), 4 * error):
        return None
    step, low = held_out[best][0], float(loss_E[best])
    return Verdict(
        "overfitting",
        f"Overfitting: the held-out loss rises since step {step}, from {wording.loss(low)} to "
        f"{wording.loss(float(loss_E[-1]))}. Use what was kept at step {step}.",
        step,
    )


def _course(x_N: np.ndarray, y_N: np.ndarray, name: str, *, as_measured: bool = False) -> Verdict:
    """Falling or flat, for a curve of finite values. A fall is told by the line through it, or by what was measured at
    its ends: evaluations are few and a reader compares them with what the run printed."""
    level_N, noise = smooth(y_N), noise_of(y_N)
    third = max(5, min(10, len(y_N) // 2), math.ceil(len(y_N) / 3))
    x_tail, y_tail = x_N[-third:], y_N[-third:]
    end = float(np.median(level_N[-max(3, third // 2) :]))
    fall = max(0.0, float(level_N[0]) - end)
    material = MATERIAL * max(abs(end), fall)
    slope, significant = _theil_sen(x_tail, y_tail)
    drop = -slope * float(x_tail[-1] - x_tail[0])
    if drop > material and significant:
        last = float(np.median(y_tail - slope * (x_tail - x_tail[-1])))
        before, after = (float(y_tail[0]), float(y_tail[-1])) if as_measured else (last + drop, last)
        return Verdict(
            "falling",
            f"Still falling: the {name} went from {wording.loss(before)} to {wording.loss(after)} from step "
            f"{x_tail[0]:.0f} to {x_tail[-1]:.0f}. More steps may help.",
        )
    band = material + 3 * noise / math.sqrt(_effective(len(y_N)))
    outside = np.flatnonzero(np.abs(level_N - end) > band)
    first = min(int(outside[-1]) + 1 if len(outside) else 0, len(x_N) - third)
    since = int(x_N[first])
    course = f"the {name} stays around {wording.loss(end)} since step {since}"
    unseen = 2 * noise * math.sqrt(12 / third)  # two standard errors of the fall of a line through the last third
    if unseen > 3 * material:
        return Verdict("flat", f"Flat within its noise: {course}; a fall below {unseen:.2g} would not show.", since)
    return Verdict("flat", f"Flat: {course}. Time to stop.", since)


def _with_held_out(said: Verdict, held_out: Sequence[tuple[int, float]]) -> Verdict:
    """Where the best evaluation is, added to a verdict that does not say so."""
    if len(held_out) < 2:
        return said
    step, best = min(held_out, key=lambda point: point[1])
    last = wording.loss(held_out[-1][1])
    more = f" Held-out: best {wording.loss(best)} at step {step}, last {last}."
    return replace(said, sentence=said.sentence + more)


def _effective(num_points: int) -> float:
    """How many points a smoothed level averages over: the Gaussian's area over its peak."""
    return max(1.0, 2 * math.sqrt(math.pi) * max(1.0, 0.03 * num_points))


def _theil_sen(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, bool]:
    """The median of the slopes between all pairs of points, and whether Mann-Kendall's test is sure that they fall."""
    if len(x_N) > 400:  # pairs grow with the square
        chosen = np.linspace(0, len(x_N) - 1, 400).round().astype(int)
        x_N, y_N = x_N[chosen], y_N[chosen]
    number = len(x_N)
    first, second = np.triu_indices(number, k=1)
    run, rise = x_N[second] - x_N[first], y_N[second] - y_N[first]
    slope = float(np.median(rise[run > 0] / run[run > 0])) if (run > 0).any() else 0.0
    score = float(np.sign(rise).sum())
    deviation = math.sqrt(number * (number - 1) * (2 * number + 5) / 18)
    return slope, (score + 1) / deviation < -1.96
