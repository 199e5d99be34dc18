"""Events as lines of JSON, and back.

Every number is valid JSON: a loss that is not finite is written as null, and `nonfinite` says what it was:

    {"event": "step", "job": "r8", "step": 12, "loss": null, ..., "nonfinite": {"loss": "nan"}}

It has the shape of the object itself: a metric of the objective stands under `{"metrics": {name: "inf"}}`.
"""

from __future__ import annotations

import json
import math
from typing import Any

from lowrank.train.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    JobFinished,
    Notice,
    Preparing,
    RunFinished,
    RunStarted,
    StepDone,
)


def as_line(event: Event, *, step: int, time: float) -> dict[str, Any]:
    """The event as one flat JSON object (the objective's metrics under `metrics`).

    `step` stands in where the event has none of its own; `time` is in seconds since 1970.
    """
    if isinstance(event, RunStarted):
        line: dict[str, Any] = {"event": "run_started", **_run(event)}
    elif isinstance(event, StepDone):
        line = {"event": "step", **{name: value for name, value in vars(event).items() if name != "logged"}}
    elif isinstance(event, EvalDone):
        line = {"event": "eval", **vars(event)}
    elif isinstance(event, CheckpointSaved):
        line = {"event": "checkpoint", "step": event.step, "path": str(event.path)}
    elif isinstance(event, JobFinished):
        line = {"event": "job_finished", **vars(event)}
    elif isinstance(event, Notice):
        line = {"event": "notice", "job": event.job, "step": step, "level": event.level, "text": event.text}
    elif isinstance(event, Preparing):
        line = {"event": "preparing", "step": step, **vars(event)}
    else:
        assert isinstance(event, RunFinished)
        line = {"event": "run_finished", "step": step, "interrupted": event.interrupted}
    return {**line, "time": round(time, 3)}


def _run(event: RunStarted) -> dict[str, Any]:
    jobs = [dict(vars(job)) for job in event.jobs]
    return {"output_dir": str(event.output_dir), "device": event.device, "dtype": event.dtype, "jobs": jobs}


def encode(line: dict[str, Any], ascii: bool = False) -> str:
    """One line of JSON, without the line break; `ascii` escapes all other characters."""
    plain, strange = _split(line)
    return json.dumps(plain | ({"nonfinite": strange} if strange else {}), ensure_ascii=ascii, allow_nan=False)


def _split(value: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object with null for what is not finite, and those places alone, with what stood there."""
    plain, strange = dict(value), {}
    for name, item in value.items():
        if isinstance(item, dict):
            plain[name], inner = _split(item)
            if inner:
                strange[name] = inner
        elif isinstance(item, float) and not math.isfinite(item):
            plain[name], strange[name] = None, str(item)
    return plain, strange


def decode(text: str) -> dict[str, Any]:
    """What `encode` was given; numbers that are not finite are floats again. ValueError if it is no JSON object."""
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError(f"expected a JSON object, got {text[:40]!r}")
    return _join(line, line.pop("nonfinite", {}))


def _join(plain: dict[str, Any], strange: dict[str, Any]) -> dict[str, Any]:
    restored = {
        name: _join(plain[name], item) if isinstance(item, dict) else float(item) for name, item in strange.items()
    }
    return {**plain, **restored}
