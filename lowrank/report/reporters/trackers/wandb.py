"""Weights & Biases: one W&B run per job, in a group named after the run folder.

Project, entity, mode and keys come from W&B's own settings and environment (WANDB_PROJECT, WANDB_MODE ...). A
resumed run is a new W&B run of the same group that begins at its step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowrank.report.events import EvalDone, Event, RunFinished, RunStarted, StepDone
from lowrank.report.reporters.scalars import scalars


def connect(output_dir: Path) -> WandbReporter:
    """ImportError without the package `wandb`."""
    import wandb  # pyright: ignore[reportMissingImports]

    return WandbReporter(wandb, output_dir)


class WandbReporter:
    """Logs against `step`, the job's optimizer step."""

    def __init__(self, wandb: Any, output_dir: Path) -> None:
        self._wandb, self._group = wandb, output_dir.name
        self._runs: dict[str, Any] = {}
        self._exit_code = 1

    def report(self, event: Event) -> None:
        """A run of Weights & Biases for each job, and its numbers of every step and evaluation."""
        if isinstance(event, RunStarted):
            self._runs = {job.name: self._start(event, index) for index, job in enumerate(event.jobs)}
        elif isinstance(event, (StepDone, EvalDone)) and (numbers := scalars(event)):
            self._runs[event.job].log({"step": event.step, **numbers})
        elif isinstance(event, RunFinished):
            self._exit_code = int(event.interrupted)

    def _start(self, event: RunStarted, index: int) -> Any:
        configs = event.config.get("jobs") or [{}]
        run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "lowrank"),
            group=self._group,
            name=f"{self._group}/{event.jobs[index].name}",
            config={**event.config, "jobs": None, **configs[index % len(configs)]},
            reinit="create_new",
        )
        run.define_metric("*", step_metric="step")
        return run

    def close(self) -> None:
        """End the runs, with exit code 1 where they were interrupted."""
        for run in self._runs.values():
            run.finish(exit_code=self._exit_code)
