"""A sweep while it runs: what is known of each candidate, and which of them go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.search.candidates import Candidate, num_trials
from lowrank.search.config import SweepConfig
from lowrank.search.halving import PRUNE, Halving, rung_shares, rung_steps
from lowrank.search.sampler import OptunaSampler
from lowrank.train.job import Job, JobProgress


@dataclasses.dataclass
class Trial:
    """A candidate and how far it came."""

    candidate: Candidate
    num_steps: int = 0
    values: list[list[float]] = dataclasses.field(default_factory=list)
    """`[step, value]` at each rung it came to; lower is better."""
    finished: str | None = None
    step: int = 0
    best: float | None = None
    """Its best value; lower is better."""
    loss: float | None = None
    """The held-out loss at its best evaluation, nats per token."""
    score: float | None = None
    rows: list[list[float]] | None = None
    """See `JobProgress.best_rows`."""

    @property
    def name(self) -> str:
        """Its candidate's, which is the job's."""
        return self.candidate.name


class Sweep:
    """The `Search` of a job queue (pipelines/job_queue.py), for the candidates of one sweep."""

    def __init__(
        self, settings: SweepConfig, candidates: Sequence[Candidate], metric: str, warmup: float = 0.0
    ) -> None:
        """`metric`: what the jobs are evaluated by: loss, or a score of which the highest is best. `warmup`: the
        longest of their schedules, as a share of the steps."""
        self.settings, self.metric = settings, metric
        self.trials = {candidate.name: Trial(candidate) for candidate in candidates}
        shares = rung_shares(num_trials(settings), settings.reduction_factor, settings.first_rung, warmup)
        self.shares = [] if settings.search == "none" else shares
        self._halving = Halving(settings.reduction_factor, settings.search == "successive_halving")
        self._halving.alive = list(self.trials)
        self.sampler = OptunaSampler(settings) if settings.sampler == "optuna" else None

    def on_started(self, job: Job) -> None:
        """See Search. A candidate is evaluated at the rungs, and the losses of its held-out rows are kept."""
        trial = self.trials.get(job.name)
        if trial is not None:
            trial.num_steps = job.num_steps
            job.eval_at = frozenset(rung_steps(self.shares, job.num_steps))
            job.keep_row_losses = True

    def on_evaluated(self, evaluated: Sequence[Job]) -> Mapping[str, str]:
        """See Search. Returns new states for candidates that have reached a rung, and for others that waited for
        them."""
        at: dict[int, dict[str, float]] = {}
        for job in evaluated:
            trial = self.trials.get(job.name)
            if trial is None:
                continue
            self._note(trial, job.progress)
            if not job.active or job.progress.step not in job.eval_at:
                continue
            rung = sorted(job.eval_at).index(job.progress.step)
            value = _value(job.progress.last_loss, job.progress.last_score)
            trial.values.append([job.progress.step, value])
            at.setdefault(rung, {})[job.name] = value
        decided: dict[str, str] = {}
        for rung, values in sorted(at.items()):
            decided |= self._halving.arrived(rung, values)
        return self._noted(decided)

    def on_finished(self, job: Job) -> Mapping[str, str]:
        """See Search."""
        trial = self.trials.get(job.name)
        if trial is None:
            return {}
        self._note(trial, job.progress)
        if trial.finished is None:
            trial.finished = job.progress.finished or "done"
        return self._noted(self._halving.left(job.name))

    def on_failed(self, name: str, reason: str) -> Mapping[str, str]:
        """See Search."""
        if name not in self.trials:
            return {}
        self.trials[name].finished = reason
        return self._noted(self._halving.left(name))

    def propose(self) -> Candidate | None:
        """See Search. The candidate is drawn by the results so far; None if there are enough, or all were drawn at the
        beginning."""
        if self.sampler is None or len(self.trials) >= num_trials(self.settings):
            return None
        candidate = self.sampler.propose(len(self.trials), list(self.trials.values()))
        self.trials[candidate.name] = Trial(candidate)
        self._halving.alive.append(candidate.name)
        return candidate

    def _note(self, trial: Trial, progress: JobProgress) -> None:
        trial.step, trial.rows = progress.step, progress.best_rows
        trial.loss, trial.score = progress.best_loss, progress.best_score
        trial.best = None if progress.best_loss is None else _value(progress.best_loss, progress.best_score)

    def _noted(self, decided: Mapping[str, str]) -> Mapping[str, str]:
        """Every decision goes through here, so that the table never says of a candidate that was ended that it runs."""
        for name, what in decided.items():
            if what == PRUNE:
                self.trials[name].finished = "pruned"
        return decided

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        trials = [dataclasses.asdict(trial) for trial in self.trials.values()]
        return {"trials": trials, "halving": self._halving.state(), "rungs": list(self.shares)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.trials, self.shares = trials_of(state), list(state["rungs"])
        self._halving.load_state(state["halving"])


def trials_of(state: Mapping[str, Any]) -> dict[str, Trial]:
    """The candidates, by name, of what `Sweep.state` returned."""
    found = {}
    for kept in state["trials"]:
        candidate = Candidate(**kept["candidate"])
        others = {name: value for name, value in kept.items() if name != "candidate"}
        found[candidate.name] = Trial(candidate, **others)
    return found


def _value(loss: float | None, score: float | None) -> float:
    """Lower is better."""
    if score is not None:
        return -score
    return float("inf") if loss is None else loss
