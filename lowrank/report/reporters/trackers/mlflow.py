"""MLflow: one MLflow run per job, in one experiment.

The server and the experiment come from MLflow's own environment (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME). A
resumed run is a new MLflow run that begins at its step.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowrank.report.events import EvalDone, Event, RunFinished, RunStarted, StepDone
from lowrank.report.reporters.scalars import scalars


def connect(output_dir: Path) -> MlflowReporter:
    """ImportError without the package `mlflow`."""
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    return MlflowReporter(MlflowClient(), output_dir)


class MlflowReporter:
    """Uses MLflow's client, which keeps no global run."""

    def __init__(self, client: Any, output_dir: Path) -> None:
        self._client, self._name = client, output_dir.name
        self._runs: dict[str, str] = {}
        self._status = "FAILED"

    def report(self, event: Event) -> None:
        """A run of MLflow's for each job, and its numbers of every step and evaluation."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, (StepDone, EvalDone)):
            for name, value in scalars(event).items():
                self._client.log_metric(self._runs[event.job], name, value, step=event.step)
        elif isinstance(event, RunFinished):
            self._status = "KILLED" if event.interrupted else "FINISHED"

    def _start(self, event: RunStarted) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "lowrank")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        for job in event.jobs:
            run = self._client.create_run(experiment, run_name=f"{self._name}/{job.name}").info.run_id
            self._client.log_param(run, "description", job.description)
            self._client.log_dict(run, event.config, "config.json")
            self._runs[job.name] = run

    def close(self) -> None:
        """End the runs, as killed where they were interrupted."""
        for run in self._runs.values():
            self._client.set_terminated(run, self._status)
