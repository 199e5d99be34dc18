"""The table of a sweep: who is best, how sure that is, and what became of the others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import SWEEP_TABLE
from lowrank.search.sweep import Sweep, Trial

_Z = 1.96
"""Standard errors on each side of a 95 % interval."""


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The best first: those that were not pruned, then those that came furthest; among equals by their best value."""

    def key(trial: Trial) -> tuple[float, float]:
        reached = trial.step if trial.finished in ("pruned", "not_finite", "stopped", "failed") else math.inf
        return -reached, math.inf if trial.best is None else trial.best

    return sorted(trials, key=key)


def table(sweep: Sweep) -> dict[str, Any]:
    """Plain JSON, every number finite: `candidates`, the best first, and what the search saved.

    `interval`: 95 %, of the loss, or the metric of answers, over held-out rows, each row one draw. `difference` is to
    the best, row for row, with an interval of its own, which is far narrower, since all candidates are asked the same
    rows; `tied`: it includes 0.
    """
    order = ranked(list(sweep.trials.values()))
    best = order[0] if order and order[0].best is not None and math.isfinite(order[0].best) else None
    rows = [_row(place, trial, best) for place, trial in enumerate(order, start=1)]
    taken, planned = sum(trial.step for trial in order), sum(trial.num_steps for trial in order)
    return {
        "metric": sweep.metric,
        "search": sweep.settings.search,
        "sampler": sweep.settings.sampler,
        "rungs": [round(share, 6) for share in sweep.shares],
        "best": None if best is None else best.name,
        "steps": taken,
        "steps_of_all": planned,
        "candidates": rows,
    }


def write_table(sweep: Sweep, folder: Path) -> dict[str, Any]:
    """Write sweep.json into a run folder; what it says."""
    found = table(sweep)
    write_text(folder / SWEEP_TABLE, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return found


def _row(place: int, trial: Trial, best: Trial | None) -> dict[str, Any]:
    error = _standard_error(trial.rows)
    loss, score = _finite(trial.loss), _finite(trial.score)
    reached = loss if trial.score is None else score
    row: dict[str, Any] = {
        "place": place,
        "name": trial.name,
        "values": dict(trial.candidate.values),
        "state": trial.finished or ("waiting" if not trial.step else "running"),
        "step": trial.step,
        "num_steps": trial.num_steps,
        "loss": loss,
        "score": score,
        "interval": None if error is None or reached is None else [reached - _Z * error, reached + _Z * error],
        "difference": None,
        "difference_interval": None,
        "tied": None,
        "rungs": [[int(step), _finite(value)] for step, value in trial.values],
    }
    compared = _compared(trial.rows, best.rows) if best is not None and best is not trial else None
    if compared is not None:
        difference, error = compared
        interval = [difference - _Z * error, difference + _Z * error]
        row |= {"difference": difference, "difference_interval": interval, "tied": interval[0] <= 0 <= interval[1]}
    return row


def _standard_error(rows: list[list[float]] | None) -> float | None:
    """Of a mean over rows of different weight (the linearized variance of a ratio)."""
    if rows is None or len(rows[0]) < 2:
        return None
    share_N, count_N = np.array(rows[0]), np.array(rows[1])
    return _standard_error_from(share_N - share_N.sum() * count_N / max(count_N.sum(), 1e-12))


def _compared(one: list[list[float]] | None, other: list[list[float]] | None) -> tuple[float, float] | None:
    """The difference of two losses on the same rows, and its standard error; None where the rows are others."""
    if one is None or other is None or len(one[0]) < 2 or one[1] != other[1]:
        return None
    share_N, count_N = np.array(one[0]) - np.array(other[0]), np.array(one[1])
    error = _standard_error_from(share_N - share_N.sum() * count_N / max(count_N.sum(), 1e-12))
    return None if error is None else (float(share_N.sum()), error)


def _standard_error_from(residual_N: np.ndarray) -> float | None:
    """Of a sum over rows, from each row's difference to what is expected of it; None where it is not finite."""
    number = len(residual_N)
    error = math.sqrt(number / (number - 1) * float((residual_N**2).sum()))
    return error if math.isfinite(error) else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
