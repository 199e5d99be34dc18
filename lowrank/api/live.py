"""`lowrank.LiveRun`: a run that is training, to be looked at and steered by whoever can see its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.api.keywords import known_keywords
from lowrank.api.settings import plain_settings
from lowrank.checkpoints.live_commands import CommandReply, read_state, replies, send
from lowrank.checkpoints.run_folder import CONFIG, STOP
from lowrank.config import JobConfig, RunConfig, read_file, validate_settings
from lowrank.data.sources.memory import IN_MEMORY
from lowrank.errors import ConfigError, OutputError, did_you_mean, raise_all
from lowrank.pipelines.resolve import is_run
from lowrank.report.live import LiveJob, is_training, jobs_of
from lowrank.third_party import code_allowed, objects_given

LOOKS_EVERY = 0.05
"""Seconds between looks for an answer."""

_given_to_runs: dict[Path, list[GivenToRun]] = {}
"""By run folder: what `LiveRun.add` was given in this process for a run that trains in it."""


@dataclass(frozen=True)
class GivenToRun:
    """What only this process has of a job that was added: its objects by name, and the settings that hold its rows."""

    objects: Mapping[str, Any]
    config: JobConfig


def take_given(run: Path) -> list[GivenToRun]:
    """What was added to a run that has ended; the caller keeps it from now on."""
    return _given_to_runs.pop(run.resolve(), [])


class LiveRun:
    """A run that trains, in this process (call from another thread), in another one, or on another machine.

        live = lowrank.LiveRun("runs/first")
        for job in live.jobs():
            print(job.name, job.state, job.step, job.loss, job.verdict, job.seconds_left)
        live.set("r8", {"optimizer.learning_rate": 1e-5})
        live.clone("r8", {"optimizer.learning_rate": 1e-4}, new_name="r8-hot")
        live.stop("r64")

    Every method that sends a command returns what the run replied, which it does between two of its steps, and
    raises OutputError for what it refused, or if no reply came within `timeout` seconds (None: as long as it trains).
    A command is carried out once, also where the run is killed and goes on from a checkpoint.
    """

    @known_keywords
    def __init__(self, path: str | Path, *, timeout: float | None = None, wait: float = 0.0) -> None:
        """`wait`: seconds that a run which was only just started may take until it trains. ConfigError for times that
        are none, OutputError if `path` is no run folder."""
        problems = [
            f"{name}: expected a number of seconds, got {value!r}"
            for name, value in {"timeout": 0.0 if timeout is None else timeout, "wait": wait}.items()
            if not _is_number(value, float, int) or not value >= 0
        ]
        raise_all(ConfigError, "LiveRun cannot be made so:", problems)
        self.path, self.timeout = Path(path), timeout
        began = time.monotonic()
        while time.monotonic() - began < wait and not (is_run(self.path) and self.training):
            time.sleep(LOOKS_EVERY)
        if not is_run(self.path):
            raise OutputError(f"{self.path} is no run folder: there is no {CONFIG} of a run in it")

    def __repr__(self) -> str:
        jobs = ", ".join(f"{job.name}: {job.state}" for job in self.jobs())
        return f"LiveRun({str(self.path)!r}, {jobs})"

    @property
    def training(self) -> bool:
        """Whether a process trains it now."""
        return is_training(self.path)

    def jobs(self) -> list[LiveJob]:
        """Every job: what it does, how far it is, its losses, what its curve says, how long it still takes."""
        return jobs_of(self.path, training=self.training)

    def add(self, job: Mapping[str, Any] | str | Path, *, folder: Path | None = None, **changes: Any) -> str:
        """One job more. `job`: settings, or a YAML or JSON file with them: a `name`, and whatever differs from the
        top level of the run's settings; `changes` stand over them. Paths that do not exist as they stand are looked
        for in `folder` too, at first the file's. Rows in memory can be given where this process trains. ConfigError,
        before the command is sent, for settings that cannot be."""
        if isinstance(job, Mapping):
            content, source = dict(job), "the job's settings"
        else:
            content, source, folder = read_file(Path(job)), str(job), folder or Path(job).parent
            content.setdefault("name", Path(job).stem)
        given = plain_settings({**content, **changes})
        with ExitStack() as stack:
            stack.enter_context(code_allowed(False))
            stack.enter_context(objects_given(given.objects))
            config = self._as_job(given.values, folder, source)
        reply = self._send("add", config.name, {"settings": config.model_dump(mode="json")})
        in_memory = any(source.path.startswith(IN_MEMORY) for source in (*config.data.train, *config.data.eval))
        if given.objects or in_memory:
            _given_to_runs.setdefault(self.path.resolve(), []).append(GivenToRun(given.objects, config))
        return reply

    def stop(self, name: str) -> str:
        """End a job; its adapter as it is now is kept as `last`, and its slot is free."""
        return self._send("stop", name)

    def pause(self, name: str) -> str:
        """Let a job take no steps, and give its slot to others, until `resume`."""
        return self._send("pause", name)

    def resume(self, name: str) -> str:
        """Let a job that was paused go on where it was, as soon as there is a slot."""
        return self._send("resume", name)

    def clone(
        self,
        name: str,
        changes: Mapping[str, Any] | None = None,
        *,
        new_name: str | None = None,
        from_start: bool = False,
    ) -> str:
        """A second job like `name`, with other settings: from its present weights, optimizer state and place in the
        data, or, with `from_start`, from the beginning. `changes`: `{"optimizer.learning_rate": 1e-5}`."""
        values = {"changes": _as_overrides(changes or {}), "name": new_name, "from_start": from_start}
        return self._send("clone", name, values)

    def set(self, name: str, changes: Mapping[str, Any]) -> str:
        """Other settings for a job from its next step on: learning rate, schedule, length, clipping, patience."""
        return self._send("set", name, {"changes": _as_overrides(changes)})

    def priority(self, name: str, priority: int) -> str:
        """Who is given a slot first: the highest of those that wait, before a lower one that runs. 0 at first."""
        if not _is_number(priority, int):
            raise ConfigError(f"priority: expected a whole number, got {priority!r}")
        return self._send("priority", name, {"priority": priority})

    def end(self) -> str:
        """Let the whole run save and end between two steps, within a second or so; it can be resumed."""
        self._refuse_unless_training("stop")
        (self.path / STOP).touch()
        return (
            "the run saves and ends after the step in which it notices; to go on: `lowrank train` of the same settings "
            "with resume=true, or TrainedRun.resume in Python"
        )

    def _as_job(self, content: Mapping[str, Any], folder: Path | None, source: str) -> JobConfig:
        run = read_file(self.path / CONFIG)
        top = {key: value for key, value in run.items() if key not in ("jobs", "sweep", "resume", "overwrite")}
        problems: list[str] = []
        if content.get("name") in [job["name"] for job in run.get("jobs", ())]:
            problems.append(f"name: {content['name']!r} is a job of this run already; choose another")
        found: RunConfig | None = None
        try:
            found = validate_settings({**top, "jobs": [dict(content)]}, folder=folder, source=source)
        except ConfigError as error:  # a job's own settings have no place among others' here
            problems += [line.removeprefix("jobs.0.") for line in error.problems or (str(error),)]
        raise_all(ConfigError, f"{source} cannot be used:", problems)
        assert found is not None
        return found.jobs[0]

    def _send(self, kind: str, job: str, values: Mapping[str, Any] | None = None) -> str:
        self._refuse_unless_training(kind)
        if kind != "add":
            names = [one.get("name") for one in read_state(self.path).get("jobs", ())]
            if names and job not in names:
                raise OutputError(f"there is no job {job!r} in {self.path}{did_you_mean(job, names)}")
        command = send(self.path, kind, job, values)
        reply = self._reply(command.number)
        if not reply.done:
            raise OutputError(reply.text)
        return reply.text

    def _refuse_unless_training(self, kind: str) -> None:
        if not self.training:
            also = f"; `lowrank train {self.path / CONFIG} resume=true` goes on with it" if kind == "resume" else ""
            raise OutputError(f"{self.path} is not training, so it takes no commands{also}")

    def _reply(self, number: int) -> CommandReply:
        began = time.monotonic()
        while True:
            found = replies(self.path).get(number)
            if found is not None:
                return found
            if self.timeout is not None and time.monotonic() - began > self.timeout:
                raise OutputError(
                    f"command {number} was not answered within {self.timeout:g} seconds; it is carried out before the "
                    "run's next step, and the answer will be in commands/log.jsonl"
                )
            if not self.training:
                raise OutputError(
                    f"command {number} was not answered before the run ended; it is carried out if the run is resumed"
                )
            time.sleep(LOOKS_EVERY)


def _is_number(value: object, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _as_overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in changes.items()]
