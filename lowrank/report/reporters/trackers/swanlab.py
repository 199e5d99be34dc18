"""SwanLab: one experiment per run, charts grouped by job.

Mode and keys come from SwanLab's own settings and environment (SWANLAB_MODE, SWANLAB_API_KEY ...). A resumed run is
a new experiment that begins at its step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.report.events import EvalDone, Event, RunStarted, StepDone
from lowrank.report.reporters.scalars import scalars


def connect(output_dir: Path) -> SwanlabReporter:
    """ImportError without the package `swanlab`."""
    import swanlab  # pyright: ignore[reportMissingImports]

    return SwanlabReporter(swanlab, output_dir)


class SwanlabReporter:
    """SwanLab has one active experiment per process, so all jobs share it."""

    def __init__(self, swanlab: Any, output_dir: Path) -> None:
        self._swanlab, self._name = swanlab, output_dir.name
        self._run: Any = None

    def report(self, event: Event) -> None:
        """One experiment; numbers are named `job/metric`."""
        if isinstance(event, RunStarted):
            self._run = self._swanlab.init(project="lowrank", experiment_name=self._name, config=event.config)
        elif isinstance(event, (StepDone, EvalDone)) and (numbers := scalars(event)):
            named = {f"{event.job}/{name}": value for name, value in numbers.items()}
            self._run.log(named, step=event.step)

    def close(self) -> None:
        """End the experiment."""
        if self._run is not None:
            self._run.finish()
