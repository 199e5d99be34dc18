"""`summary.json`: what came out of a run, per run and per job, with the verdict on every curve."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank import __version__
from lowrank.checkpoints.adapter_folder import JOB_FOLDERS
from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import METRICS
from lowrank.report.curve import Curve
from lowrank.report.events import EvalDone, Event, JobFinished, JobStarted, RunStarted, StepDone
from lowrank.report.process_memory import memory_use
from lowrank.report.verdict import CurveVerdict, verdict

SUMMARY = "summary.json"
PLOT = "loss.png"


@dataclass
class _Job:
    """What is counted of one job. Everything here goes through JSON, into a checkpoint and back."""

    steps: int = 0
    epoch: float = 0.0
    skipped_steps: int = 0
    train_tokens: int = 0
    loss_tokens: float = 0.0
    train_seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    evals: list[list[float]] = field(default_factory=list)
    """`[step, loss]` of each finite evaluation."""
    best: list[float] | None = None
    best_score: float | None = None
    eval_metric: str = "loss"
    """What decides which evaluation is the best; `best_score` is its value there, unless it is the loss."""
    metrics: dict[str, float] = field(default_factory=dict)
    """What the objective added to the last evaluation, where it is finite."""
    finished: str | None = None
    optimizer_state_bytes: int = 0
    curve: dict[str, Any] = field(default_factory=lambda: Curve().state())


class SummaryBuilder:
    """A reporter that counts, and at the end writes summary.json and loss.png.

    `previous` is what `state()` returned when the checkpoint was written from which the run goes on; counts,
    curves and peaks continue from there, as if the run had never stopped.
    """

    def __init__(
        self, output_dir: Path, previous: dict[str, Any] | None = None, plan: dict[str, Any] | None = None
    ) -> None:
        previous = previous or {}
        self.output_dir = output_dir
        self._run: RunStarted | None = None
        self._jobs = {name: _Job(**job) for name, job in previous.get("jobs", {}).items()}
        self._curves = {name: Curve.restore(job.curve) for name, job in self._jobs.items()}
        self._train_tokens: int = previous.get("train_tokens", 0)
        self._train_seconds: float = previous.get("train_seconds", 0.0)
        self._peaks: dict[str, int] = dict(previous.get("peaks", {}))
        self._round: set[str] = set()
        self.plot_problem: str | None = None
        self.winner: str | None = None
        """The best job, where something else than its losses decides (a sweep)."""
        self._plan = plan
        """The memory plan's parts and `peak`, in bytes; None if there is none."""

    def report(self, event: Event) -> None:
        """Note what the event adds to the summary."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, JobStarted):
            self._come(event)
        elif isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, EvalDone):
            job = self._jobs[event.job]
            job.metrics = {name: value for name, value in event.metrics.items() if math.isfinite(value)}
            if math.isfinite(event.loss):
                job.evals.append([event.step, event.loss])
            if event.best:
                job.best = [event.step, event.loss]
                job.best_score = event.metrics.get(event.metric)
            job.eval_metric = event.metric
        elif isinstance(event, JobFinished):
            self._jobs[event.job].finished = event.reason
            self._jobs[event.job].optimizer_state_bytes = event.optimizer_state_bytes

    def _start(self, event: RunStarted) -> None:
        self._run = event
        self._jobs = {job.name: self._jobs.get(job.name, _Job(steps=job.first_step)) for job in event.jobs}
        self._curves = {name: self._curves.get(name, Curve()) for name in self._jobs}
        for started in event.jobs:
            over = started.finished or ("done" if started.first_step >= started.num_steps else None)
            self._jobs[started.name].finished = over

    def _come(self, event: JobStarted) -> None:
        """A job that was added, or that waited and has a slot now."""
        assert self._run is not None, "the run has not begun"
        known = {job.name: job for job in self._run.jobs}
        self._run = replace(self._run, jobs=tuple({**known, event.name: event}.values()))
        self._jobs.setdefault(event.name, _Job(steps=event.first_step))
        self._curves.setdefault(event.name, Curve())

    def _step(self, event: StepDone) -> None:
        job = self._jobs[event.job]
        job.steps, job.epoch = event.step, event.epoch
        job.skipped_steps += event.skipped
        job.train_tokens += event.tokens
        job.loss_tokens += event.loss_tokens
        job.train_seconds += event.seconds
        if math.isfinite(event.loss):
            job.first_loss = event.loss if job.first_loss is None else job.first_loss
            job.last_loss = event.loss
        self._curves[event.job].add(event.step, event.loss)
        self._train_tokens += event.tokens
        if not self._round or event.job in self._round:  # jobs share the wall time of a step: count it once
            self._round.clear()
            self._train_seconds += event.seconds
        self._round.add(event.job)

    def close(self) -> None:
        """Nothing is open."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint; plain JSON, of bounded size but for the evaluations."""
        jobs = {name: asdict(job) | {"curve": self._curves[name].state()} for name, job in self._jobs.items()}
        return {
            "jobs": jobs,
            "train_tokens": self._train_tokens,
            "train_seconds": self._train_seconds,
            "peaks": self._measure_peaks(),
        }

    def _measure_peaks(self) -> dict[str, int]:
        memory = memory_use(self._run.device if self._run else "cpu")
        now = {"host": memory.peak} | ({} if memory.device_peak is None else {"device": memory.device_peak})
        self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in now.items()}
        return dict(self._peaks)

    def memory(self) -> dict[str, int | None]:
        """Bytes: `used`, the peak so far, of the device's memory if there is one, and `planned`."""
        peaks = self._measure_peaks()
        return {
            "used": peaks.get("device", peaks["host"]),
            "planned": None if self._plan is None else int(self._plan["peak"]),
        }

    def as_dict(self, interrupted: bool = False) -> dict[str, Any]:
        """What stands in summary.json; plain JSON, every number finite. See docs for the meaning of each key.

        Seconds are of optimizer steps only: no loading, no evaluation. Bytes are the peak of this process.
        `first_loss` and `last_loss` are of single steps, the first and last whose loss was finite.
        """
        assert self._run is not None, "the run has not begun"
        peaks = self._measure_peaks()
        jobs = {job.name: self._of_job(job) for job in self._run.jobs}
        return {
            "output_dir": str(self.output_dir),
            "interrupted": interrupted,
            "best_job": self.winner or best_job(jobs, self._run.config),
            "train_tokens": self._train_tokens,
            "train_seconds": round(self._train_seconds, 3),
            "tokens_per_second": _rate(self._train_tokens, self._train_seconds),
            "peak_memory_bytes": peaks["host"],
            "peak_device_memory_bytes": peaks.get("device"),
            "predicted_peak_memory_bytes": self._plan and self._plan["peak"],
            "prediction_error": self._prediction_error(peaks),
            "memory_plan": self._plan,
            "device": self._run.device,
            "dtype": self._run.dtype,
            "jobs": jobs,
            "paths": {"metrics": METRICS, "plot": PLOT},
            "versions": versions(),
        }

    def _prediction_error(self, peaks: dict[str, int]) -> float | None:
        """(predicted - measured) / measured, of the memory the plan is about: the device's if there is one."""
        if self._plan is None:
            return None
        measured = peaks.get("device", peaks["host"])
        return round(self._plan["peak"] / measured - 1.0, 4) if measured else None

    def _of_job(self, started: JobStarted) -> dict[str, Any]:
        job = self._jobs[started.name]
        found = self.curve_verdict(started.name)
        return {
            "description": started.description,
            "trainable_parameters": started.num_trainable,
            "pictures": started.pictures,
            "objective": self._objective_of(started.name),
            "steps": job.steps,
            "num_steps": started.num_steps,
            "epochs": round(job.epoch, 4),
            "skipped_steps": job.skipped_steps,
            "optimizer_state_bytes": job.optimizer_state_bytes,
            "finished": job.finished,
            "train_tokens": job.train_tokens,
            "loss_tokens": job.loss_tokens,
            "train_seconds": round(job.train_seconds, 3),
            "tokens_per_second": _rate(job.train_tokens, job.train_seconds),
            "first_loss": job.first_loss,
            "last_loss": job.last_loss,
            "best_eval": None if job.best is None else _best(job.best, job.eval_metric, job.best_score),
            "best_note": note_on_best(None if job.best is None else int(job.best[0]), job.steps),
            "last_eval": None if not job.evals else {"step": int(job.evals[-1][0]), "loss": job.evals[-1][1]},
            "eval_metrics": job.metrics,
            "verdict": asdict(found),
            "paths": self._folders(started.name),
        }

    def _objective_of(self, name: str) -> str | None:
        """The type of a job's objective; None of a job that came later."""
        assert self._run is not None, "the run has not begun"
        jobs = {job["name"]: job for job in self._run.config.get("jobs", ())}
        objective = jobs.get(name, {}).get("objective")
        return objective.get("type") if isinstance(objective, dict) else objective

    def _folders(self, name: str) -> dict[str, str]:
        """`best` and `last`, those that are there."""
        return {which: f"{name}/{which}" for which in JOB_FOLDERS if (self.output_dir / name / which).is_dir()}

    def curve_verdict(self, name: str) -> CurveVerdict:
        """What the curve of a job says so far."""
        steps, losses = self._curves[name].points()
        return verdict(steps, losses, [(int(step), loss) for step, loss in self._jobs[name].evals])

    def finish(self, interrupted: bool = False) -> dict[str, Any]:
        """Write summary.json (paths in it are relative to the run folder), then loss.png; what the first says.

        A picture that cannot be drawn costs nothing else: `plot_problem` says why.
        """
        summary = self.as_dict(interrupted)
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.output_dir / SUMMARY, text + "\n")
        try:
            self._draw()
        except Exception as error:  # fonts, a full disk
            self.plot_problem = f"{PLOT} could not be written ({type(error).__name__}: {error})"
        return summary

    def _draw(self) -> None:
        from lowrank.report.plots import write_loss_plot  # matplotlib: half a second and 30 MB, wanted at the end alone

        metrics = self.output_dir / METRICS
        title = f"{self.output_dir.name}: loss"
        write_loss_plot(metrics if metrics.exists() else self._lines(), self.output_dir / PLOT, title)

    def _lines(self) -> list[dict[str, Any]]:
        """The curves, for a run that nobody kept a metrics.jsonl of."""
        lines: list[dict[str, Any]] = []
        for name, job in self._jobs.items():
            points = zip(*self._curves[name].points())
            lines += [{"event": "step", "job": name, "step": step, "loss": loss} for step, loss in points]
            lines += [{"event": "eval", "job": name, "step": int(step), "loss": loss} for step, loss in job.evals]
        return lines


def best_job(jobs: dict[str, dict[str, Any]], config: dict[str, Any]) -> str | None:
    """The job with the lowest held-out loss, or the best score of generated answers; None where these do not compare.

    They compare if every job has one, by the same `eval_metric`, of the same objective on the same held-out rows.
    """
    if len(jobs) == 1:
        return next(iter(jobs))
    best = {name: job["best_eval"] for name, job in jobs.items() if job["best_eval"]}
    if len(best) < len(jobs) or not _comparable(config.get("jobs", ())):
        return None
    return min(best, key=lambda name: (-best[name].get("score", 0.0), best[name]["loss"]))


def _best(step_and_loss: list[float], metric: str, score: float | None) -> dict[str, Any]:
    step, loss = step_and_loss
    return {"step": int(step), "loss": loss} | ({} if score is None else {"metric": metric, "score": score})


UNTRAINED_BEST = (
    "best is step 0, before any training, since no later evaluation was better; what training ended with is last "
    "(--last, in Python which='last')"
)


def note_on_best(best_step: int | None, steps: int) -> str | None:
    """What a person who takes the best of a job should know: that it is the adapter before the first of its `steps`."""
    return UNTRAINED_BEST if best_step == 0 and steps else None


def _comparable(configs: Any) -> bool:
    measured = []
    for config in configs:
        data = dict(config.get("data") or {})
        if data.get("eval"):  # the rows are named; which rows are trained on does not matter
            for name in ("train", "mix", "shuffle", "batch_size", "batch_tokens", "validation_split", "streaming"):
                data.pop(name, None)
            measured.append([_measured_by(config), data])
        else:
            measured.append([_measured_by(config), data, config.get("seed")])
    return bool(measured) and all(each == measured[0] for each in measured)


def _measured_by(config: Any) -> list[Any]:
    return [config.get(name) for name in ("objective", "eval_metric", "eval_generate_samples", "eval_max_new_tokens")]


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if seconds > 0 else None


def versions() -> dict[str, str]:
    """What ran."""
    found = {"lowrank": __version__, "python": platform.python_version(), "platform": platform.platform()}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
