"""A line for each job of a run: what it does now if the run says so, else what its files tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.board.live_commands import live_jobs
from lowrank.board.runs import RunEntry
from lowrank.board.tasks import OUTPUT
from lowrank.foreign_files import find_object

STATES = (
    "waiting", "running", "queued", "paused", "held", "done", "early_stopping", "not_finite", "stopped", "pruned",
    "interrupted", "failed",
)  # fmt: skip
"""Of a job, as `lowrank jobs` has them."""
OVER = STATES[5:]


def job_lines(
    run: RunEntry | None, steps: dict[str, float], ends: dict[str, str], task: Path | None, *, trains: bool
) -> list[dict[str, Any]]:
    """`steps` and `ends`: how far each is and why it ended, from metrics.jsonl; `task`: the folder of the task that
    trains it."""
    known = {str(job): own for job, own in ((run.summary.get("jobs") if run else None) or {}).items()}
    planned = _planned(task)
    live = {str(job["name"]): job for job in live_jobs(run.folder)} if run is not None and trains else {}
    best = run.summary.get("best_job") if run else None
    names = list(dict.fromkeys([*planned, *known, *live, *steps]))
    return [_line(name, live[name]) for name in names if name in live] + [
        {
            "name": name,
            "description": own.get("description") or planned.get(name, {}).get("description", ""),
            "state": ends.get(name) or own.get("finished") or "",
            "step": steps.get(name, own.get("steps", 0)),
            "steps": planned.get(name, {}).get("num_steps") or own.get("num_steps"),
            "verdict": own.get("verdict") or {},
            "best": own.get("best_eval"),
            "last_loss": own.get("last_loss"),
            "is_best": best == name and len(names) > 1,
        }
        for name in names
        if name not in live
        for own in (known.get(name) or {},)
    ]


def _line(name: str, job: dict[str, Any]) -> dict[str, Any]:
    """From commands/state.json."""
    best, verdict = job.get("best_loss"), job.get("verdict")
    return {
        "name": name,
        "description": job.get("description", ""),
        "state": job.get("state"),
        "step": job.get("step"),
        "steps": job.get("num_steps"),
        "verdict": verdict if isinstance(verdict, dict) and verdict.get("kind") != "too_short" else {},
        "best": None if best is None else {"loss": best},
        "last_loss": job.get("loss"),
        "learning_rate": job.get("learning_rate"),
        "priority": job.get("priority"),
        "seconds_left": job.get("seconds_left"),
        "steered": job.get("state") not in OVER,
    }


def _planned(folder: Path | None) -> dict[str, dict[str, Any]]:
    """The jobs of a running task, as its `run_started` line lists them."""
    if folder is None:
        return {}
    try:
        with open(folder / OUTPUT, encoding="utf-8", errors="replace") as file:
            for _, line in zip(range(200), file):
                if '"run_started"' in line:
                    return {job["name"]: job for job in (find_object(line) or {}).get("jobs", ())}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return {}
