"""How far a plan could be stretched: the largest micro-batch and the longest document that fit.

Memory grows with the tokens of a document at most quadratically (attention written out), so three simulated sizes tell
the rest; with the number of equal documents on a straight line, so two do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank.planning.plan import MARGIN, MemoryPlan, Planner
from lowrank.segments import Segment, number_the_step

_SIZES = (1024, 2048, 4096)
_MOST = 10_000_000


def largest_tokens(planner: Planner, plan: MemoryPlan) -> int:
    """Tokens of one forward pass that fit, in documents as long as the longest of the run's steps."""
    longest = max((segment for job in planner.memory.jobs for segment in job.step), key=len)
    if longest.media is None:
        one = _text(len(longest), _share_of_loss(planner))
    else:
        one = Segment(longest.token_L, longest.weight_L, media=longest.media)

    def documents(tokens: int) -> list[Segment]:
        return [one] * max(1, tokens // len(one))

    return _round_down(_largest(planner, plan, documents, _SIZES[1:]))


def longest_document(planner: Planner, plan: MemoryPlan) -> int:
    """Tokens of one document that fit, of text; at most what the model was made for."""
    limit, share = planner.memory.max_length or _MOST, _share_of_loss(planner)
    if limit <= _SIZES[-1] and _peak(planner, plan, [_text(limit, share)]) <= MARGIN * plan.available:
        return limit
    found = _largest(planner, plan, lambda tokens: [_text(tokens, share)], _SIZES)
    return limit if found >= limit else _round_down(found)


def _largest(
    planner: Planner, plan: MemoryPlan, documents: Callable[[int], list[Segment]], wanted: tuple[int, ...]
) -> int:
    sizes, peaks = [], []
    for size in wanted:
        segments = documents(size)
        sizes.append(sum(map(len, segments)))
        peaks.append(_peak(planner, plan, segments))
    room = MARGIN * plan.available
    if len(sizes) == 2 or len(set(sizes)) < len(sizes):  # a line, or one document fills several sizes
        slope = (peaks[-1] - peaks[0]) / max(1, sizes[-1] - sizes[0])
        return max(0, min(_MOST, int(sizes[0] + (room - peaks[0]) / slope))) if slope > 0 else sizes[-1]
    a, b, c = np.polyfit(sizes, peaks, 2)
    if abs(a) * sizes[-1] < 1e-3 * abs(b):  # a straight line, but for rounding
        b, c = np.polyfit(sizes[1:], peaks[1:], 1)
        return max(0, min(_MOST, int((room - c) / b)))
    inside = b * b - 4 * a * (c - room)
    return max(0, min(_MOST, int((-b + inside**0.5) / (2 * a)))) if inside >= 0 else 0


def _peak(planner: Planner, plan: MemoryPlan, segments: list[Segment]) -> int:
    slot = next(iter(planner.memory.work))
    work = {slot: number_the_step(segments)}
    step = planner.memory.step(sum(map(len, segments)), plan.activation_checkpointing, work)
    return planner.total(step)


def _share_of_loss(planner: Planner) -> float:
    weights = [(segment.weight_L != 0).mean() for job in planner.memory.jobs for segment in job.step]
    return float(np.mean(weights)) if weights else 1.0


def _text(length: int, share: float) -> Segment:
    weight_L = np.zeros(length, np.float32)
    weight_L[length - int(share * length) :] = 1.0
    return Segment(np.zeros(length, np.int64), weight_L)


def _round_down(number: int) -> int:
    """To two digits: a plan is no more exact."""
    unit = 10 ** max(0, len(str(number)) - 2)
    return number // unit * unit
