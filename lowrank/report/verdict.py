"""What a loss curve says in plain words: the answer to "when do I stop?"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lowrank.report import formatting
from lowrank.report.curve import noise_of, smooth

Curve = Literal["train", "held_out"]
Kind = Literal["falling", "flat", "overfitting", "diverged", "too_short"]

MIN_LOSSES = 12
"""Fewer finite training losses say nothing."""
MIN_EVALS = 8
"""From this many evaluations on, the held-out curve decides between falling and flat."""
MATERIAL = 0.01
"""Changes below this share of the loss itself do not matter to anybody. Of its whole fall they may be nothing and still
halve it: a loss that went from 5.8 to 0.1 and goes on to 0.05 is learning."""
SMALLEST = 0.001
"""Nats per token. Nor do changes below this, however small the loss is: a tenth of a per cent of each probability."""


PARTS = {
    "not_finite": "Diverged: the loss is not a finite number since step {step}. A lower learning rate or a longer "
    "warmup may help.",
    "risen": "Diverged: the training loss rose from {low} around step {step} to {end}. A lower learning rate may help.",
    "overfitting": "Overfitting: the held-out loss rises since step {step}, from {low} to {end}. Use what was kept at "
    "step {step}.",
    "too_short": "Too short to say: at least {least} training losses are needed, there are {count}.",
    "falling_train": "Still falling: the training loss went from {before} to {after} from step {first} to {last}. "
    "More steps may help.",
    "falling_held_out": "Still falling: the held-out loss went from {before} to {after} from step {first} to {last}. "
    "More steps may help.",
    "flat_train": "Flat: the training loss stays around {end} since step {step}. Time to stop.",
    "flat_held_out": "Flat: the held-out loss stays around {end} since step {step}. Time to stop.",
    "noisy_train": "Flat within its noise: the training loss stays around {end} since step {step}; a fall below "
    "{unseen} would not show.",
    "noisy_held_out": "Flat within its noise: the held-out loss stays around {end} since step {step}; a fall below "
    "{unseen} would not show.",
    "evaluations": "Held-out: best {best} at step {step}, last {last}.",
}
"""What verdicts are made of. Values are text, losses with four digits; the board has them in Chinese
(board/translations/verdicts.zh.json)."""


@dataclass(frozen=True)
class CurveVerdict:
    """`step`: since when it is flat or diverged, or, where it overfits, the best one. `parts`: what it says, as
    `{"part": key of PARTS, name: value}`, for those who say it in another language."""

    kind: Kind
    sentence: str
    step: int | None = None
    parts: list[dict[str, str]] = field(default_factory=list)


def _verdict(kind: Kind, step: int | None, part: str, **values: object) -> CurveVerdict:
    own = {name: f"{value}" for name, value in values.items()}
    if step is not None:
        own["step"] = str(step)
    return CurveVerdict(kind, PARTS[part].format(**own), step, [{"part": part, **own}])


def verdict(
    steps: Sequence[int], losses: Sequence[float], eval_points: Sequence[tuple[int, float]] = ()
) -> CurveVerdict:
    """Judge a training curve (nats per token at ascending steps) and held-out `(step, loss)` points.

    The rules, in order; levels are of the smoothed curve (`curve.smooth`), noise is `curve.noise_of`:

    1. diverged: of the last three losses at least two are not finite; or the curve ends above its lowest
       level by more than 25 % of its whole fall, 10 % of that level, and 6 standard errors.
    2. overfitting: the best held-out loss is at step b, at least two evaluations came after it, the last
       two are both worse, and their mean is worse than the level around b by more than 1 % and 4 standard
       errors.
    3. too short: fewer than 12 finite losses, and fewer than 8 evaluations.
    4. falling: over the last third (of fewer than 30 points: the last 10, at most half), or over the last eighth
       (at least 12 points: a plateau that ends late), the Theil-Sen slope is negative with 97.5 and 99 % confidence
       (Mann-Kendall), and the fall it makes is more than 1 % of the loss itself. Judged on the held-out curve if
       there are at least 8 evaluations, since learning that helps nobody is no reason to go on; else on the
       training curve, and, where that is flat, on the last two evaluations: a held-out loss that is still lower
       than the one before by 1 % is still falling.
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
        found = _course(points[:, 0], points[:, 1], "held_out")
        return _with_held_out(found, held_out) if found.kind == "flat" else found
    if finite < MIN_LOSSES:
        return _verdict("too_short", None, "too_short", count=finite, least=MIN_LOSSES)
    known_N = np.isfinite(y_N)
    found = _course(x_N[known_N], y_N[known_N], "train")
    still = _last_evaluations(held_out) if found.kind == "flat" else None
    return still or _with_held_out(found, held_out)


def _not_finite(x_N: np.ndarray, y_N: np.ndarray) -> CurveVerdict | None:
    bad_N = ~np.isfinite(y_N)
    if len(y_N) == 0 or bad_N[-3:].sum() < min(2, len(y_N)):
        return None
    good = np.flatnonzero(~bad_N)
    since = int(x_N[min(good[-1] + 1, len(x_N) - 1)] if len(good) and bad_N[-1] else x_N[np.flatnonzero(bad_N)[0]])
    return _verdict("diverged", since, "not_finite")


def _risen(x_N: np.ndarray, y_N: np.ndarray) -> CurveVerdict | None:
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
    return _verdict("diverged", since, "risen", low=formatting.loss(low), end=formatting.loss(end))


def _overfitting(held_out: Sequence[tuple[int, float]]) -> CurveVerdict | None:
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
    low, end = formatting.loss(float(loss_E[best])), formatting.loss(float(loss_E[-1]))
    return _verdict("overfitting", held_out[best][0], "overfitting", low=low, end=end)


def _material(loss: float) -> float:
    """The smallest change of this loss that matters."""
    return max(MATERIAL * abs(loss), SMALLEST)


def _last_evaluations(held_out: Sequence[tuple[int, float]]) -> CurveVerdict | None:
    """Falling, if the last evaluation is the best and better than the one before by more than its noise; there are too
    few of them for a line."""
    if len(held_out) < 2:
        return None
    (before_step, before), (step, last) = held_out[-2:]
    noise = noise_of([loss for _, loss in held_out]) if len(held_out) >= 6 else 0.0
    if last > min(loss for _, loss in held_out) or before - last <= max(_material(last), 3 * noise):
        return None
    return _falling("held_out", before, last, before_step, step)


def _falling(curve: Curve, before: float, after: float, first: float, last: float) -> CurveVerdict:
    return _verdict(
        "falling", None, f"falling_{curve}", before=formatting.loss(before), after=formatting.loss(after),
        first=f"{first:.0f}", last=f"{last:.0f}",
    )  # fmt: skip


def _course(x_N: np.ndarray, y_N: np.ndarray, curve: Curve) -> CurveVerdict:
    """Falling or flat, for a curve of finite values. A fall is told by the line through it, or, of held-out losses, by
    what was measured at its ends: evaluations are few and a reader compares them with what the run printed."""
    level_N, noise = smooth(y_N), noise_of(y_N)
    third = max(5, min(10, len(y_N) // 2), math.ceil(len(y_N) / 3))
    end = float(np.median(level_N[-max(3, third // 2) :]))
    material = _material(end)
    for number, sure in ((third, 1.96), (max(12, math.ceil(len(y_N) / 8)), 2.33)):
        x_tail, y_tail = x_N[-number:], y_N[-number:]
        slope, deviations = _theil_sen(x_tail, y_tail)
        drop = -slope * float(x_tail[-1] - x_tail[0])
        if number <= third and drop > material and deviations < -sure:
            last = float(np.median(y_tail - slope * (x_tail - x_tail[-1])))
            before, after = (float(y_tail[0]), float(y_tail[-1])) if curve == "held_out" else (last + drop, last)
            return _falling(curve, before, after, x_tail[0], x_tail[-1])
    band = material + 3 * noise / math.sqrt(_effective(len(y_N)))
    outside = np.flatnonzero(np.abs(level_N - end) > band)
    first = min(int(outside[-1]) + 1 if len(outside) else 0, len(x_N) - third)
    since = int(x_N[first])
    unseen = 2 * noise * math.sqrt(12 / third)  # two standard errors of the fall of a line through the last third
    if unseen > 3 * material:
        return _verdict("flat", since, f"noisy_{curve}", end=formatting.loss(end), unseen=f"{unseen:.2g}")
    return _verdict("flat", since, f"flat_{curve}", end=formatting.loss(end))


def _with_held_out(found: CurveVerdict, held_out: Sequence[tuple[int, float]]) -> CurveVerdict:
    """Where the best evaluation is, added to a verdict that does not say so."""
    if len(held_out) < 2:
        return found
    step, best = min(held_out, key=lambda point: point[1])
    more = _verdict(found.kind, step, "evaluations", best=formatting.loss(best), last=formatting.loss(held_out[-1][1]))
    return replace(found, sentence=f"{found.sentence} {more.sentence}", parts=[*found.parts, *more.parts])


def _effective(num_points: int) -> float:
    """How many points a smoothed level averages over: the Gaussian's area over its peak."""
    return max(1.0, 2 * math.sqrt(math.pi) * max(1.0, 0.03 * num_points))


def _theil_sen(x_N: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """(median slope of all pairs of points, Mann-Kendall's statistic in standard deviations from chance)."""
    if len(x_N) > 400:  # pairs grow with the square
        chosen = np.linspace(0, len(x_N) - 1, 400).round().astype(int)
        x_N, y_N = x_N[chosen], y_N[chosen]
    number = len(x_N)
    first, second = np.triu_indices(number, k=1)
    run, rise = x_N[second] - x_N[first], y_N[second] - y_N[first]
    slope = float(np.median(rise[run > 0] / run[run > 0])) if (run > 0).any() else 0.0
    score = float(np.sign(rise).sum())
    deviation = math.sqrt(number * (number - 1) * (2 * number + 5) / 18)
    return slope, (score + 1) / deviation
