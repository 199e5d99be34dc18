"""The model and the adapters that a path names (resolve.py), before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowrank.checkpoints.adapter_folder import CONFIG_FILE, JOB_FOLDERS, check_which, is_adapter
from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import read_adapter_header
from lowrank.checkpoints.run_folder import CHECKPOINTS
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.steps import latest_checkpoint
from lowrank.config import JobConfig, RunConfig, settings_of_run
from lowrank.data import templates
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError, LowrankError, ModelError, did_you_mean, raise_all
from lowrank.foreign_files import find_json
from lowrank.models.config import ModelConfig, named_model
from lowrank.notices import log_notice
from lowrank.pipelines.resolve import ArtifactKind, Resolved, is_run, resolve
from lowrank.report.summary import SUMMARY

BASE_NAME = "base"
"""The name of the base without adapter among the models."""
Adapters = Sequence[str] | Mapping[str, str]
"""Paths of adapters; with names: by these."""
_RUN_ABOVE = 4
"""The most levels between a run's folder and an adapter in it: `<run>/checkpoints/<step>/<job>`."""
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""Files of an adapter's folder that may have a chat template."""


@dataclass(frozen=True)
class ModelArtifacts:
    """A model and the adapters on it, found but not loaded.

    data            settings by which the base reads a conversation
    adapters        folders of the adapters, by name
    data_of         settings by which adapters read one, where they are those of their training
    trained_base    job name and folder of a run that trained the base itself; then the original base is not there
    """

    model: ModelConfig
    data: DataConfig
    adapters: Mapping[str, Path] = field(default_factory=dict)
    data_of: Mapping[str, DataConfig] = field(default_factory=dict)
    trained_base: tuple[str, Path] | None = None

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return [BASE_NAME if self.trained_base is None else self.trained_base[0], *self.adapters]


def find_artifacts(
    path: str,
    *,
    which: str = "best",
    adapters: Adapters = (),
    chat_template: str | None = None,
    base: str | None = None,
    notify: Callable[[str], None] = log_notice,
) -> ModelArtifacts:
    """Find the model and adapters that `path` names. `which`: a run's `best` or `last` adapters. `adapters`: more of
    them on the same base (`adapter_at`). `chat_template`: a built-in one or a file, instead of the run's or the
    tokenizer's. `base`: where the base of the run or adapter is now. `notify` is called with what is missing. Raises
    ModelError, ConfigError."""
    check_which(which)
    found = _find_named(path, which, chat_template, base, notify)
    return _with_more(found, path, adapters, which, own_template=chat_template is not None) if adapters else found


def _find_named(
    path: str, which: str, chat_template: str | None, base: str | None, notify: Callable[[str], None]
) -> ModelArtifacts:
    named = resolve(path)
    if named.of_run:
        config = settings_of_run(named.folder / RUN_CONFIG)
        jobs = config.jobs if named.job is None else [job_of(config, named.job)]
        return artifacts_of_run(named, config, jobs, which=which, chat_template=chat_template, base=base, notify=notify)
    return artifacts_of_folder(named, chat_template=chat_template, base=base)


def _with_more(
    found: ModelArtifacts, path: str, adapters: Adapters, which: str, *, own_template: bool
) -> ModelArtifacts:
    """Return `found` with more adapters. ConfigError with all of them that are none, or have a name that is taken."""
    named = adapters.items() if isinstance(adapters, Mapping) else [(None, each) for each in adapters]
    folders, problems = dict(found.adapters), list[str]()
    data_of = dict(found.data_of)
    for wanted, place in named:
        try:
            own_name, folder = adapter_at(place, "adapters", which)
        except LowrankError as error:
            problems.append(str(error))
            continue
        name = wanted or own_name
        if name in folders and folders[name].resolve() == folder.resolve():
            continue
        if name in (*found.names, *folders):
            problems.append(
                f"{place}: {name!r} is another's name already; in Python, adapters={{'NAME': {place!r}}} gives it one"
            )
            continue
        folders[name] = folder
        if not own_template:
            data_of[name] = data_of_adapter(folder)
    raise_all(ConfigError, f"these adapters cannot be loaded on {path}:", problems)
    return replace(found, adapters=folders, data_of=data_of)


def adapter_at(path: str, setting: str, which: str = "best") -> tuple[str, Path]:
    """Return the name and folder of the one adapter that `path` names: an adapter's folder, a run or checkpoint of one
    job, a job, or a hub name. ModelError where there is none or more than one; `setting`: who says so."""
    named = resolve(path)
    if named.kind is ArtifactKind.GGUF:
        raise ModelError(f"{setting}: {path} is in llama.cpp's layout, which goes beside a base that is a .gguf file")
    if named.kind is ArtifactKind.MODEL:
        there = "no such folder" if not named.folder.exists() else f"no {CONFIG_FILE} in it"
        raise ModelError(f"{setting}: {path} is no adapter: {there}")
    folder = adapter_folder(path, setting, which)
    return (resolve(str(folder)) if named.of_run else named).name, folder


def unused_name(name: str, taken: Collection[str]) -> str:
    """Return `name`, or with a number where it is taken."""
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return next(each for each in (name, *numbered) if each not in taken)


def artifacts_of_folder(
    named: Resolved, *, chat_template: str | None = None, base: str | None = None
) -> ModelArtifacts:
    """Return a model, or an adapter and its base. ModelError where the adapter names no base, or its folder is gone."""
    data = DataConfig(chat_template=chat_template)
    if named.kind is not ArtifactKind.ADAPTER:
        if base is not None:
            raise ModelError(f"--base: {named.path} is a model by itself, not adapters on one")
        return ModelArtifacts(named_model(named.path), data)
    header = read_adapter_header(named.folder)
    its_base, file = header.base_name or "", named.folder / CONFIG_FILE
    if base is None and not its_base:
        raise ModelError(f"{file} does not name its base model (base_model_name_or_path)")
    if base is None and Path(its_base).is_absolute() and not Path(its_base).exists():
        raise ModelError(
            f"{file} names the base {its_base} (base_model_name_or_path), and there is no such folder; say where it is "
            "now (--base PATH, base=...)"
        )
    model = named_model(base or its_base, None if base else header.revision)
    data_of = {} if chat_template else {named.name: data_of_adapter(named.folder)}
    return ModelArtifacts(model, data, {named.name: named.folder}, data_of)


def artifacts_of_run(
    named: Resolved,
    config: RunConfig,
    jobs: Sequence[JobConfig],
    *,
    which: str,
    chat_template: str | None,
    base: str | None,
    notify: Callable[[str], None],
) -> ModelArtifacts:
    """Return what these jobs of a run, or of one of its checkpoints, have trained so far; `notify` is called with those
    that have nothing yet. ModelError if none has."""
    check_which(which)
    # the data of training need not exist any more, so only settings are read
    folder, first = named.folder, jobs[0]
    settings = {job.name: _with_template(job.data, chat_template) for job in jobs}
    if named.checkpoint is not None and first.trains_base:
        raise ModelError(
            f"{named.checkpoint}: a checkpoint of tuning: {first.tuning} is no model by itself; give the run folder"
        )
    if first.trains_base and base is not None:
        raise ModelError(f"--base: {named.path} is a model by itself, not adapters on one")
    there = {job.name: path for job in jobs if (path := _trained(named, job, which)) is not None}
    missing = [job.name for job in jobs if job.name not in there]
    if not there:
        what = "model" if first.trains_base else "adapter"
        of = folder if len(jobs) == len(config.jobs) else " and ".join(str(folder / name) for name in missing)
        raise ModelError(
            f"{of} holds no trained {what} yet; one is written at a job's first evaluation or at its end. "
            "Go on with resume=true, or give the base itself"
        )
    if missing:
        notify(f"no adapter yet: {', '.join(missing)}")
    for name, path in there.items():
        if path.name != which and named.checkpoint is None:
            notify(f"{name} has no {which} yet, this is its {_which_it_is(path)}")
    if which == "best" and named.checkpoint is None:
        for note in _notes_on_best(folder, there):
            notify(note)
    if first.trains_base:
        path = there[first.name]
        trained = {"path": str(current(path)), "revision": None, "random_init": None}
        model = config.model.model_copy(update=trained)
        return ModelArtifacts(model, settings[first.name], trained_base=(first.name, path))
    model = _base_of_run(config.model, there.values(), folder, base)
    return ModelArtifacts(model, settings[first.name], there, {name: settings[name] for name in there})


def _notes_on_best(run: Path, names: Iterable[str]) -> Iterator[str]:
    """Yield what the run's summary, if there is one, notes about the best of these jobs."""
    jobs = (find_json(run / SUMMARY) or {}).get("jobs")
    for name in names:
        note = (jobs.get(name) or {}).get("best_note") if isinstance(jobs, dict) else None
        if isinstance(note, str):
            yield f"{name}: {note}"


def job_of(config: RunConfig, name: str) -> JobConfig:
    """Return the job of this name. ModelError for an unknown name."""
    jobs = {job.name: job for job in config.jobs}
    if name not in jobs:
        raise ModelError(f"this run has no job {name!r}{did_you_mean(name, jobs)}")
    return jobs[name]


def data_of_adapter(folder: Path) -> DataConfig:
    """Return the settings by which an adapter reads a conversation: of the run whose folder it is in, else with the
    template beside it."""
    own_folder = current(folder).resolve()
    for above in list(folder.resolve().parents)[:_RUN_ABOVE]:
        if is_run(above):
            try:
                jobs = settings_of_run(above / RUN_CONFIG).jobs
            except LowrankError:
                break
            parts = folder.resolve().relative_to(above).parts
            data = next((job.data for job in jobs if job.name in parts), None)
            if data is not None:
                return data
    for name in TEMPLATE_FILES:
        if templates.has_template(own_folder / name):
            return DataConfig(chat_template=str(own_folder / name))
    return DataConfig()


def _base_of_run(
    model: ModelConfig, adapters: Iterable[Path | None], folder: Path, base: str | None = None
) -> ModelConfig:
    """Return the base of a run's adapters: `base`, else what its settings name, else what its adapters name. ModelError
    where that is a folder that does not exist any more."""
    if base is not None:
        return model.model_copy(update={"path": base, "revision": None})
    folders = [each for each in adapters if each is not None]
    found = _with_present_path(model, folders)
    if not Path(found.path).exists():
        names = [found.path, *(read_adapter_header(each).base_name or "" for each in folders)]
        gone = next((name for name in names if Path(name).is_absolute() or name.startswith((".", "~"))), None)
        if gone is not None:
            raise ModelError(
                f"{folder / RUN_CONFIG} names the base {gone} (model.path), and there is no such folder; say where it "
                "is now (--base PATH, base=...)"
            )
    return found


def _with_present_path(model: ModelConfig, adapters: Iterable[Path | None]) -> ModelConfig:
    """Return the model with a path that exists: a run may name its base relative to another current directory, but its
    adapters name it by its full path."""
    if not Path(model.path).exists():
        for adapter in adapters:
            base = read_adapter_header(adapter).base_name if adapter else None
            if base and Path(base).is_dir():
                return model.model_copy(update={"path": base})
    return model


def with_adapters_found(config: RunConfig) -> RunConfig:
    """Return the settings with `adapter.path` and `objective.reward_model` resolved to the folder of one adapter each,
    where they name a run, a job of one, or an adapter on the hub. ModelError for none or more than one adapter."""
    jobs = tuple(_with_adapters_found(job) for job in config.jobs)
    return config if jobs == config.jobs else config.model_copy(update={"jobs": jobs})


def _with_adapters_found(job: JobConfig) -> JobConfig:
    changes: dict[str, Any] = {}
    for group, name in (("adapter", "path"), ("objective", "reward_model")):
        settings = getattr(job, group)
        path = getattr(settings, name, None)
        found = None if path is None else adapter_folder(path, f"{group}.{name}")
        if found is not None and str(found) != path:
            changes[group] = settings.model_copy(update={name: str(found)})
    return job.model_copy(update=changes) if changes else job


def adapter_folder(path: str, setting: str, which: str = "best") -> Path:
    """Return the folder of the one adapter that `path` names: an adapter's folder, a run or checkpoint of one job, a
    job, or a hub name. Any other path is returned as it is, and refused when it is read. `which`: of a job."""
    named = resolve(path)
    if not named.of_run:
        return named.folder
    config = settings_of_run(named.folder / RUN_CONFIG)
    first, *others = config.jobs if named.job is None else (job_of(config, named.job),)
    if others:
        names = [job.name for job in config.jobs]
        raise ModelError(
            f"{setting}: {path} is {named.kind.value} of {len(names)} jobs; name one: {', '.join(names)}, as "
            f"{path}/{first.name}"
        )
    found = None if first.trains_base else _trained(named, first, which)
    if found is None:
        raise ModelError(f"{setting}: {path} holds no trained adapter yet")
    return found


def _trained(named: Resolved, job: JobConfig, which: str) -> Path | None:
    """Return the folder of a job's `best` or `last` (`which`), else of the other, else of the last checkpoint's
    adapter."""
    folder = named.folder / job.name
    if named.checkpoint is not None:
        return _in_checkpoint(named.checkpoint / job.name)
    for name in (which, *JOB_FOLDERS):
        path = folder / name
        if (current(path) / "config.json").is_file() if job.trains_base else is_adapter(path):
            return path
    checkpoint = None if job.trains_base else latest_checkpoint(named.folder / CHECKPOINTS)
    return _in_checkpoint(checkpoint / job.name) if checkpoint else None


def _which_it_is(path: Path) -> str:
    """Return a description of the folder that `_trained` has found."""
    return path.name if path.name in JOB_FOLDERS else f"adapter of checkpoint {path.parent.name}"


def _with_template(data: DataConfig, chat_template: str | None) -> DataConfig:
    return data.model_copy(update={"chat_template": chat_template}) if chat_template else data


def _in_checkpoint(folder: Path) -> Path | None:
    return folder if is_adapter(folder) else None
