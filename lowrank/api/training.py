"""`lowrank.train`, and the run that comes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank.api.exporting import export
from lowrank.api.inference import Model, load
from lowrank.api.live import take_given
from lowrank.api.objects import given_again, refuse_missing
from lowrank.api.settings import PlainSettings, name_functions, plain_settings
from lowrank.checkpoints.run_folder import CONFIG, METRICS
from lowrank.compat import load_any
from lowrank.config import RunConfig, read_file, unused, validate_settings
from lowrank.config.jobs import as_dict
from lowrank.config.schema import JobSettings
from lowrank.dotted_keys import flat_settings
from lowrank.errors import ConfigError, OutputError, raise_all
from lowrank.notices import log_notice
from lowrank.pipelines.launch import train as train_run
from lowrank.pipelines.resolve import is_run
from lowrank.report.events import Event, Reporter
from lowrank.report.reporters import view_for
from lowrank.report.reporters.log import LogReporter
from lowrank.report.reporters.metrics import read_metrics
from lowrank.report.reporters.notebook import NotebookReporter, in_notebook
from lowrank.report.summary import SUMMARY
from lowrank.settings import Settings
from lowrank.third_party import call_problem, code_allowed, objects_given

if TYPE_CHECKING:
    import pandas

Listener = Reporter | Callable[[Event], None]
"""What receives the events of a run: a reporter, or a function that is called with each of them."""


def train(
    config: RunConfig | str | Path | None = None,
    *,
    reporters: Listener | Sequence[Listener] = (),
    progress: bool | None = None,
    strict: bool = False,
    allow_code: bool = False,
    **settings: Any,
) -> TrainedRun:
    """Train every job at once on one base.

    The settings are those of docs/settings.md, as keywords, in a file (`config`; keywords then stand over it), or as a
    `RunConfig`:

        lowrank.train(model="lowrank/tiny", data=rows, output_dir="runs/a", adapter={"rank": 8}, max_steps=100)
        lowrank.train("run.yaml", max_steps=100)

    data          rows: a list of dicts, a `datasets.Dataset`, a DataFrame, a generator (read to its end), or a function
                  that returns one; a path; or `{"train": ..., "eval": ..., **settings}` of these. A source with
                  settings of its own is `{"rows": rows, "format": "alpaca"}`, and stands in
                  `{"train": {"rows": rows, "format": "alpaca"}}`; `lowrank.rows` makes the same.
    jobs          several adapters at once: `[{"name": "r8", "adapter": {"rank": 8}}, {"name": "r64", ...}]`.
    objective     a name, settings (or their class), or an objective of your own: the class or the object. `adapter` and
                  `optimizer` take names, settings and classes too; `reward_funcs` and a source's `format` take
                  functions. An objective has what `Objective` says. A reward function is called with keywords, lists of
                  one item for each answer: `prompts`, `completions` (messages), `completion_ids`, `label` and the
                  data's columns; it returns a number for each answer.
    reporters     receive every event: objects with `report(event)` and `close()`, or plain functions; one, or a list of
                  them. One that raises is left out from then on, and training goes on.
    progress      True shows the run on the terminal, False nowhere. Left out: in a notebook as a live table and curve,
                  elsewhere as records of the logger `lowrank` (warnings are seen, the rest with
                  `logging.basicConfig(level="INFO")`).
    strict        any loss of data is an error.
    allow_code    code that settings name by `my_module:MyThing`, or that comes with the model, may run.

    Raises the errors of lowrank.errors before a weight is loaded wherever that can be known. An interrupt saves a
    checkpoint and returns; the same call with `resume=True` goes on.
    """
    if "objects" in settings:
        raise ConfigError(
            "objects: a run is given its objects where its settings stand: train(data=rows, objective=Focal(), ...); "
            "to go on with a run in a new process there is lowrank.TrainedRun(RUN).resume(objects=[...])"
        )
    listeners = _listeners(reporters, progress)
    given = plain_settings(settings)
    if isinstance(config, RunConfig):
        for job in config.jobs:
            name_functions(job.data, given.objects)
    with code_allowed(allow_code), objects_given(given.objects):
        resolved = _config(config, given)
        summary = train_run(resolved, reporters=listeners, strict=strict)
    return TrainedRun(resolved.output_dir, summary=summary, config=resolved, objects=given.objects)


def _config(config: RunConfig | str | Path | None, given: PlainSettings) -> RunConfig:
    if isinstance(config, RunConfig):
        if given.values:
            names = ", ".join(given.values)
            raise ConfigError(f"train: a RunConfig has its settings already; put these into it: {names}")
        return _warned(config, unused(config))
    if config is None:
        resolved = validate_settings(given.values, source="the settings of lowrank.train")
        return _warned(resolved, unused(resolved))
    overrides = [f"{key}={json.dumps(value, default=_as_json)}" for key, value in flat_settings(given.values)]
    resolved, warnings = load_any(config, overrides)
    return _warned(resolved, warnings)


def _warned(config: RunConfig, warnings: Sequence[str]) -> RunConfig:
    for text in warnings:
        log_notice(text)
    return config


def _as_json(value: Any) -> Any:
    return as_dict(value) if isinstance(value, Settings) else str(value)


def _listeners(reporters: Listener | Sequence[Listener], progress: bool | None) -> list[Reporter]:
    """The view that `progress` asks for, and `reporters`. ConfigError lists those that cannot receive events."""
    given: Any = reporters
    several = isinstance(given, Iterable) and not isinstance(given, str) and not hasattr(given, "report")
    listed: list[Any] = list(given) if several else [given]
    found = [(f"reporters.{number}" if several else "reporters", each) for number, each in enumerate(listed)]
    problems = [f"{place}: {problem}" for place, each in found if (problem := _reporter_problem(each))]
    raise_all(ConfigError, "train: these reporters cannot be used (docs/add-a-reporter.md):", problems)
    listening = [each if hasattr(each, "report") else _Callback(each) for each in listed]
    if progress or (progress is None and in_notebook()):
        return [NotebookReporter() if in_notebook() else view_for(), *listening]  # type: ignore[list-item]
    return [*([LogReporter()] if progress is None else []), *listening]  # type: ignore[list-item]


def _reporter_problem(thing: Any) -> str | None:
    """Why `thing` cannot receive events; None if it can."""
    if isinstance(thing, type):
        return f"{thing.__name__} is a class; give an object of it, {thing.__name__}(...)"
    receives = getattr(thing, "report", thing)
    if not callable(receives):
        trackers = "; a tracker is named by report_to" if isinstance(thing, str) else ""
        return f"{thing!r} has no method `report(event)` and is no function that could be called with events{trackers}"
    problem = call_problem(receives, "event")
    name = f"{type(thing).__name__}.report" if receives is not thing else getattr(thing, "__qualname__", repr(thing))
    return problem and f"{name} {problem}"


class _Callback:
    """A function as a reporter."""

    def __init__(self, function: Callable[[Event], None]) -> None:
        self.report = self.function = function

    def close(self) -> None:
        """A function has nothing to close."""


class TrainedRun:
    """A run folder: what `train` returns, or an earlier run, by path.

    path      the folder
    summary   what stands in its summary.json: jobs, losses, times, versions; empty while there is none
    """

    def __init__(
        self,
        path: str | Path,
        *,
        summary: Mapping[str, Any] | None = None,
        config: RunConfig | None = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        """`path` alone opens a run that is there. OutputError if it is none."""
        self.path = Path(path)
        if config is None and not is_run(self.path):
            raise OutputError(f"{self.path} is no run folder: there is no {CONFIG} of a run in it")
        self.summary: dict[str, Any] = dict(summary) if summary is not None else self._read_summary()
        added = take_given(self.path) if config is not None else []
        self._config, self._objects = config, dict(objects or {})
        for each in added:
            self._objects |= each.objects
        self._kept_rows: Any = [each.config for each in added]
        """Rows in memory live as long as the settings they came with (data/sources/memory.py)."""

    def _read_summary(self) -> dict[str, Any]:
        file = self.path / SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def interrupted(self) -> bool:
        """It was stopped before its end, and `resume` goes on."""
        return bool(self.summary.get("interrupted"))

    @property
    def jobs(self) -> list[str]:
        """Names of the jobs, each a folder with its adapter below `path`."""
        return list(self.summary.get("jobs", {}))

    def metrics(self) -> pandas.DataFrame:
        """Everything that was logged: a row for each logged step (`logging_steps`; `event` is `step`) and each
        evaluation (`eval`) of each job. Columns: `job`, `step`, `event`, `loss` (nats per token; of objectives that
        generate, as GRPO, minus the mean reward, and what is minimized is `policy_loss`), `tokens`, `time` (seconds
        since 1970); of steps `epoch`, `learning_rate`, `grad_norm`, `loss_tokens`, `seconds`, `skipped`; of evaluations
        `metric`, the one that decides, and `best`; and what the objective adds. Empty before the first step."""
        import pandas

        lines = [line for line in read_metrics(self.path / METRICS) if line.get("event") in ("step", "eval")]
        rows = [{**line, **line.get("metrics", {})} for line in lines]
        frame = pandas.DataFrame(rows).drop(columns=["metrics"], errors="ignore")
        first = [name for name in ("job", "step", "event", "loss") if name in frame]
        return frame.reindex(columns=[*first, *(name for name in frame if name not in first)])

    def load(self, **options: Any) -> Model:
        """The base with the adapters of all jobs: `lowrank.load` of this folder."""
        with objects_given(self._objects):
            return load(self.path, **options)

    def export(self, to: Any = "merged", output: str | Path | None = None, **options: Any) -> dict[str, Any]:
        """`lowrank.export` of this folder."""
        with objects_given(self._objects):
            return export(self.path, to, output, **options)

    def resume(
        self,
        *,
        objects: Sequence[Any] = (),
        reporters: Listener | Sequence[Listener] = (),
        progress: bool | None = None,
        allow_code: bool = False,
        **changes: Any,
    ) -> TrainedRun:
        """Go on from the last checkpoint, bit by bit as if it had never stopped. With another length (`max_steps`,
        `num_train_epochs`) that holds for a constant schedule; any other, whose length is the number of steps, moves,
        and a notice says from which learning rate to which.

            lowrank.TrainedRun("runs/own").resume(objects=[Focal(), short, rows], reporters=[report], max_steps=40)

        objects    in a new process, what this run was given and no file holds: objectives, reward functions, formats,
                   rows or the function that returns them. Each is known by its name, rows by their content; the order
                   matters only among those of one name. Not needed for the run that `train` returned, nor, with
                   `allow_code`, for what can be imported
        reporters  as of `train`, and so are `progress` and `allow_code`; none is kept with the run
        changes    settings that may change on the way, as `max_steps` or `num_train_epochs`; OutputError for any other

        ConfigError for an object that is missing, or that the run does not know.
        """
        listeners = _listeners(reporters, progress)
        config = self._config
        settings = read_file(self.path / CONFIG) if config is None else self._with_added_jobs(config)
        again = given_again(objects, settings)
        known = {**self._objects, **again.objects}
        of_jobs = {key: value for key, value in changes.items() if key in JobSettings.model_fields}
        settings |= {**changes, "resume": True, "overwrite": False, "output_dir": str(self.path)}
        settings["jobs"] = [{**job, **of_jobs} for job in settings.get("jobs", ())]
        with code_allowed(allow_code), objects_given(known):
            refuse_missing(settings, str(self.path))
            changed = validate_settings(settings, source=f"the settings of {self.path} with changes")
            summary = train_run(changed, reporters=listeners)
        resumed = TrainedRun(self.path, summary=summary, config=changed, objects=known)
        resumed._kept_rows += [config, again.rows, self._kept_rows]
        return resumed

    def _with_added_jobs(self, config: RunConfig) -> dict[str, Any]:
        """`config` as it was given, with the jobs that were added or cloned while it trained."""
        settings = config.model_dump(exclude_unset=True)
        file = self.path / CONFIG
        if settings.get("sweep") or not file.is_file():
            return settings
        names = {job.name for job in config.jobs}
        added = [job for job in read_file(file).get("jobs", ()) if job["name"] not in names]
        return {**settings, "jobs": [*settings.get("jobs", ()), *added]} if added else settings

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.path)!r}, jobs={self.jobs})"
