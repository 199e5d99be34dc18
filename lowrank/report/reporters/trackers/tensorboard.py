"""TensorBoard: one TensorBoard run per job, so that their curves lie over each other.

tensorboard --logdir RUN/tensorboard
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowrank.report.events import EvalDone, Event, RunStarted, StepDone
from lowrank.report.reporters.scalars import scalars


def connect(output_dir: Path) -> TensorBoardReporter:
    """ImportError without the package `tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardReporter(SummaryWriter, output_dir)


class TensorBoardReporter:
    """Writes to `<output_dir>/tensorboard/<job>`; after a resume, steps that come again are hidden."""

    def __init__(self, writer: Any, output_dir: Path) -> None:
        self._make, self._folder = writer, output_dir / "tensorboard"
        self._writers: dict[str, Any] = {}

    def report(self, event: Event) -> None:
        """A folder of events for each job; steps behind the one it goes on from are purged."""
        if isinstance(event, RunStarted):
            for job in event.jobs:
                purge = job.first_step + 1 if job.first_step else None
                self._writers[job.name] = self._make(str(self._folder / job.name), purge_step=purge)
        elif isinstance(event, (StepDone, EvalDone)):
            for name, value in scalars(event).items():
                self._writers[event.job].add_scalar(name, value, event.step)

    def close(self) -> None:
        """Write what waits, and close the files."""
        for writer in self._writers.values():
            writer.close()
