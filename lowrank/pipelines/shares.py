"""Jobs over devices and machines: each share of a run's jobs is an ordinary run with its own folder and process.

A share is a job shard, what Slurm calls an array task. Shares exchange nothing, so one that fails costs only its own
jobs' time, and is resumed by itself (`resume=true`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.atomic import write_text
from lowrank.checkpoints.run_folder import CONFIG, SHARES, STOP, open_merged_folder, refuse_unshared
from lowrank.checkpoints.settings_changes import changed_settings
from lowrank.checkpoints.shared_folder import load_or_create_assignment, read_assignment
from lowrank.config import RunConfig, read_file
from lowrank.config.code import refuse_code
from lowrank.config.share import Share, read_share
from lowrank.data.sources.memory import IN_MEMORY, titled_sources
from lowrank.data.sources.places import STANDARD_INPUT
from lowrank.errors import ConfigError, LowrankError, raise_all
from lowrank.foreign_files import find_json
from lowrank.pipelines.artifacts import with_adapters_found
from lowrank.pipelines.assign_jobs import assign_jobs
from lowrank.pipelines.memory_plan import refuse_too_many
from lowrank.pipelines.merge_shares import merge_shares
from lowrank.pipelines.processes import ENDED_IN_ORDER, Child, follow, train_arguments
from lowrank.pipelines.train import read_jobs
from lowrank.report.events import (
    Event,
    Notice,
    Reporter,
    RunFinished,
    RunStarted,
    Stage,
)
from lowrank.report.summary import SUMMARY
from lowrank.third_party import code_allowed
from lowrank.train.listeners import Listeners
from lowrank.train.stop_signal import StopSignal


class SharesFailed(LowrankError):
    """Some shares of a run have failed; the others are complete. `exit_code`: that of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def config_of_own_share(config: RunConfig, reporters: Sequence[Reporter], *, strict: bool) -> RunConfig:
    """Return the settings of the share that `config.share` names: its jobs, in its folder. The data of all jobs are
    read to assign them, unless another share has assigned them already. ConfigError for a share without jobs."""
    assert config.share is not None
    share = read_share(config.share, os.environ)
    refuse_unshared(config.output_dir)
    names = [job.name for job in config.jobs]

    def by_cost() -> dict[str, int]:
        return _assign_by_cost(config, share.of, Listeners([], reporters), strict)

    return config_of_share(config, share, load_or_create_assignment(config.output_dir, names, share.of, by_cost))


def config_of_share(config: RunConfig, share: Share, shares: Mapping[str, int]) -> RunConfig:
    """Return the settings with only the jobs of one share, in its folder. ConfigError if it has none."""
    jobs = tuple(job for job in config.jobs if shares[job.name] == share.number)
    if not jobs:
        raise ConfigError(f"share: {share} has no job: there are {len(config.jobs)} jobs in all; use fewer shares")
    folder = config.output_dir / SHARES / share.folder
    return config.model_copy(update={"jobs": jobs, "output_dir": folder, "share": None, "devices": 1})


def _assign_by_cost(config: RunConfig, of: int, report: Callable[[Event], None], strict: bool) -> dict[str, int]:
    config = with_adapters_found(config)
    _, data = read_jobs(config, report, strict)
    refuse_too_many(config, data)
    return assign_jobs(config, data, of)


def train_shares(
    config: RunConfig,
    number: int,
    *,
    reporters: Sequence[Reporter] = (),
    strict: bool = False,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Train the jobs in `number` processes on this machine, each with its own device. Returns the contents of the
    merged summary.json. Settings and data are checked before any process starts. SharesFailed if some have failed."""
    refuse_rows_in_memory(config)
    names = [job.name for job in config.jobs]
    merged = _MergedReporter(config, Listeners([], reporters))
    report = merged.report
    stop_signal = StopSignal(Path(config.output_dir) / STOP)
    with code_allowed(allow_code):
        refuse_code(config, "the settings")
        with open_merged_folder(
            config.output_dir, jobs=names, resume=config.resume, overwrite=config.overwrite
        ) as folder:
            for note in folder.notes:
                report(Notice(note))
            stop_signal.delete_stale_file()
            begun = config.resume and read_assignment(config.output_dir) is not None
            fresh = {} if begun else _assign_by_cost(config, number, report, strict)
            folder.clear()
            shares = load_or_create_assignment(config.output_dir, names, number, lambda: fresh)
            children = [_child(config, Share(each, number), shares, strict) for each in sorted({*shares.values()})]
            children = [child for child in children if not _is_over(child)]
            follow(children, merged.on_event, stop_signal, lambda text: report(Notice(text, "warning")))
            return _end(config, children, report)


def refuse_rows_in_memory(config: RunConfig) -> None:
    """ConfigError for rows in the memory or standard input of this process, which other processes cannot read."""
    problems = [
        f"{job.name}: {title}: rows in the memory, or from the standard input, of this process"
        for job in config.jobs
        for _, _, source, title in titled_sources(job.data)
        if source.path.startswith(IN_MEMORY) or source.path in STANDARD_INPUT
    ]
    raise_all(
        ConfigError, "devices: other processes cannot read these rows; write them to a file and name it:", problems
    )


def device_environment(config: RunConfig, index: int, number: int) -> dict[str, str]:
    """Return the environment variables that give process `index` (from 0) of `number` its own device."""
    environment = {"LOCAL_WORLD_SIZE": str(number)}
    if uses_gpus(config):
        visible = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    elif "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // number))
    return environment


def uses_gpus(config: RunConfig) -> bool:
    """Return whether the run uses CUDA devices (or ROCm, which torch calls CUDA, too)."""
    return config.model.device in ("auto", "cuda") and torch.cuda.is_available()


def _child(config: RunConfig, share: Share, shares: Mapping[str, int], strict: bool) -> Child:
    settings = config_of_share(config, share, shares).model_copy(update={"overwrite": False})
    file = config.output_dir / SHARES / f"{share.folder}.json"
    write_text(file, json.dumps(settings.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    environment = device_environment(config, share.number - 1, share.of)
    return Child(
        f"share {share}", train_arguments(file, strict), settings.output_dir, file.with_suffix(".log"), environment
    )


def _is_over(child: Child) -> bool:
    """Return whether the share has ended with these very settings, so that resuming it would do nothing."""
    summary, before = find_json(child.folder / SUMMARY), find_json(child.folder / CONFIG)
    if summary is None or before is None or summary["interrupted"]:
        return False
    settings = read_file(Path(child.arguments[1]))
    length = ("max_steps", "num_train_epochs", "early_stopping_patience")
    same = [[job[name] for name in length] for job in before["jobs"]] == [
        [job[name] for name in length] for job in settings["jobs"]
    ]
    for job in settings["jobs"]:  # a run's settings have the date on which it began
        job["data"]["chat_template_date"] = before["jobs"][0]["data"]["chat_template_date"]
    return same and not changed_settings(before, settings)


class _MergedReporter:
    """Merges the events of all shares into those of one run."""

    def __init__(self, config: RunConfig, report: Listeners) -> None:
        self._config, self._report = config, report
        self._begun = False
        self._noticed: set[str] = set()
        self._names = {job.name for job in config.jobs}

    def report(self, event: Event) -> None:
        """Report an event, but a notice that several shares give only once."""
        if isinstance(event, Notice):
            if event.text in self._noticed:
                return
            names, _, text = event.text.partition(": ")  # a notice about all jobs of a share has no names
            self._noticed |= {event.text, *([text] if {*names.split(", ")} <= self._names else [])}
        self._report(event)

    def on_event(self, child: Child, event: Event) -> None:
        """Report an event of a share. The first share that starts starts the run."""
        if isinstance(event, RunStarted):
            self._start(event)
        elif isinstance(event, Stage):
            self.report(Stage(f"{child.name}: {event.text}"))
        else:
            self.report(event)

    def _start(self, event: RunStarted) -> None:
        if self._begun:
            for job in event.jobs:
                self._report(job)
            return
        self._begun = True
        settings = self._config.model_dump(mode="json")
        self._report(RunStarted(self._config.output_dir, event.jobs, settings, event.device, event.dtype))


def _end(config: RunConfig, children: Sequence[Child], report: Callable[[Event], None]) -> dict[str, Any]:
    """Merge the shares and report the end of the run; return the merged summary. SharesFailed if some have failed."""
    failed = [child for child in children if child.code not in ENDED_IN_ORDER]
    summary = merge_shares(config.output_dir, lambda text: report(Notice(text, "warning")), locked=True)
    if failed:
        failures: dict[str, list[str]] = {}
        for child in failed:
            failures.setdefault(child.stderr_tail(), []).append(child.name)
        text = "\n".join(f"{', '.join(names)}: {tail}" for tail, names in failures.items())
        if len(failures) == 1 and len(failed) == len(children):
            text = next(iter(failures))
        elif len(failed) < len(children):
            text += "\nThe other shares are complete; the same command with resume=true continues with the rest"
        raise SharesFailed(text, next((child.code for child in failed if child.code and child.code > 0), 1))
    if summary is None:  # all were interrupted before their first step
        raise KeyboardInterrupt
    report(RunFinished(summary, bool(summary["interrupted"])))
    return summary
