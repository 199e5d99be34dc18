"""Events as lines of JSON, and back.

Every number is valid JSON: a loss that is not finite is written as null, and `nonfinite` says what it was:

    {"event": "step", "job": "r8", "step": 12, "loss": null, ..., "nonfinite": {"loss": "nan"}}

It has the shape of the object itself: a metric of the objective stands under `{"metrics": {name: "inf"}}`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from lowrank.foreign_files import find_object
from lowrank.report.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    JobFinished,
    JobMoved,
    JobStarted,
    Notice,
    Preparing,
    RunFinished,
    RunStarted,
    Stage,
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
    elif isinstance(event, JobMoved):
        line = {"event": "job_moved", **vars(event)}
    elif isinstance(event, JobStarted):
        line = {"event": "job_started", "job": event.name, "step": event.first_step, **vars(event)}
    elif isinstance(event, Notice):
        line = {"event": "notice", "job": event.job, "step": step, "level": event.level, "text": event.text}
    elif isinstance(event, Stage):
        line = {"event": "stage", "step": step, "text": event.text}
    elif isinstance(event, Preparing):
        line = {"event": "preparing", "step": step, **vars(event)}
    else:
        assert isinstance(event, RunFinished)
        line = {"event": "run_finished", "step": step, "interrupted": event.interrupted}
    return {**line, "time": round(time, 3)}


def as_event(line: dict[str, Any]) -> Event | None:
    """The event that `as_line` made a line of; None for a line that is none (`progress`) and for the last, whose
    summary no line holds. The settings of a run are not in its line."""
    kind = line.get("event")
    if kind == "run_started":
        jobs = tuple(JobStarted(**job) for job in line["jobs"])
        return RunStarted(Path(line["output_dir"]), jobs, {}, line["device"], line["dtype"])
    if kind == "checkpoint":
        return CheckpointSaved(line["step"], Path(line["path"]))
    known = _KINDS.get(str(kind))
    if known is None:
        return None
    return known(**{each.name: line[each.name] for each in dataclasses.fields(known) if each.name in line})


_KINDS: dict[str, Any] = {
    "step": StepDone,
    "eval": EvalDone,
    "job_finished": JobFinished,
    "job_moved": JobMoved,
    "job_started": JobStarted,
    "notice": Notice,
    "stage": Stage,
    "preparing": Preparing,
}


def _run(event: RunStarted) -> dict[str, Any]:
    jobs = [dict(vars(job)) for job in event.jobs]
    return {"output_dir": str(event.output_dir), "device": event.device, "dtype": event.dtype, "jobs": jobs}


def encode(line: dict[str, Any], ascii: bool = False) -> str:
    """One line of JSON, without the line break; `ascii` escapes all other characters. It can be written as UTF-8: a
    file's name need not be (Python then has half a surrogate pair in it), and stands there as JSON escapes it."""
    plain, strange = _split(line)
    text = json.dumps(plain | ({"nonfinite": strange} if strange else {}), ensure_ascii=ascii, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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
    line = find_object(text)
    if line is None:
        raise ValueError(f"expected a JSON object, got {text[:40]!r}")
    try:
        return _join(line, line.pop("nonfinite", {}))
    except (AttributeError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected numbers by name as nonfinite, got {text[:40]!r}") from error


def _join(plain: dict[str, Any], strange: dict[str, Any]) -> dict[str, Any]:
    restored = {
        name: _join(plain[name], item) if isinstance(item, dict) else float(item) for name, item in strange.items()
    }
    return {**plain, **restored}
