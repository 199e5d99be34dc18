"""What there is to take home: a run, an adapter or a model, found and described, with no weights of the base loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

import lowrank.models.loading as loading
from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import CONFIG_FILE, AdapterOnDisk, load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.config import JobConfig, RunConfig, resolve
from lowrank.config.read import read_file
from lowrank.data.chat_template import without_marks
from lowrank.data.config import Config as DataConfig
from lowrank.data.rendering import Renderer
from lowrank.errors import DataError, ModelError, did_you_mean
from lowrank.export.combine import Config as CombineConfig
from lowrank.export.combine import combine
from lowrank.export.held_out import HeldOut, from_data, from_file, from_questions, training_documents
from lowrank.export.source import Source
from lowrank.found import find_trained, is_run, where_it_is_now
from lowrank.models.config import Config as ModelConfig
from lowrank.models.depths import refuse
from lowrank.planning.simulation import read_config
from lowrank.train.summary import SUMMARY

_BASE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Found:
    """A source, and what is needed to ask it about its own data."""

    source: Source
    folder: Path
    """What was named: nothing is written inside it."""
    renderer: Renderer
    job: JobConfig | None = None

    def held_out(self, prompts: str | None, *, documents: int = 16) -> HeldOut:
        """Documents to compare on: rows of the file `prompts`, else the run's held-out rows, else general questions."""
        seed = self.job.seed if self.job else 0
        if prompts is not None:
            return from_file(prompts, self.renderer, seed, documents=documents)
        if self.job is not None:
            try:
                record = self.job.objective.build().record
                return from_data(self.job.data, self.renderer, record, seed, documents=documents)
            except DataError:
                pass  # what it was trained on need not be there any more
        return from_questions(self.renderer, chat=self.source.chat_template is not None)


def open_source(
    path: str,
    *,
    adapters: Sequence[str] = (),
    which: str = "best",
    combination: CombineConfig | None = None,
    chat_template: str | None = None,
    notify: Callable[[str], None] = print,
) -> Found:
    """What `path` names: a run folder, an adapter folder (PEFT's too), or a model.

    `adapters`: names of a run's jobs, or more adapter folders of the same base; several are combined. Without a name a
    run gives its best job. Raises ModelError, ConfigError.
    """
    folder = Path(path)
    if is_run(folder):
        return _of_run(folder, adapters, which, combination, chat_template, notify)
    if (current(folder) / CONFIG_FILE).is_file():
        return _of_adapters([folder, *map(Path, adapters)], combination, chat_template, notify)
    if adapters:
        return _of_adapters([Path(name) for name in adapters], combination, chat_template, notify, base=path)
    model = ModelConfig(path=path)
    return _found(folder.name or path, folder, model, None, DataConfig(chat_template=chat_template), {})


def _of_run(
    folder: Path,
    names: Sequence[str],
    which: str,
    combination: CombineConfig | None,
    chat_template: str | None,
    notify: Callable[[str], None],
) -> Found:
    config = resolve(read_file(folder / RUN_CONFIG), source=str(folder / RUN_CONFIG))
    summary = _read_json(folder / SUMMARY)
    jobs = [_job(config, name) for name in names or [_best(config, summary, notify)]]
    places = {job.name: find_trained(folder / job.name, which, job.trains_base) for job in jobs}
    for name, place in places.items():
        if place is None:
            raise ModelError(
                f"{folder / name} holds nothing trained yet; go on with resume=true, or choose another job"
            )
        if place.name != which:
            notify(f"{name} has no {which} yet, this is its {place.name}")
    first = jobs[0]
    data = first.data.model_copy(update={"chat_template": chat_template}) if chat_template else first.data
    facts = _facts(config, jobs, summary)
    if first.trains_base:
        model = config.model.model_copy(update={"path": str(current(places[first.name] or folder)), "revision": None})
        return _found(first.name, folder, model, None, data, facts | {"base": config.model.path}, first)
    loaded = [(name, load_adapter(place)) for name, place in places.items() if place is not None]
    adapter = _combined(loaded, combination, notify)
    model = where_it_is_now(config.model, places.values())
    return _found("+".join(places), folder, model, adapter, data, facts, first)


def _of_adapters(
    folders: Sequence[Path],
    combination: CombineConfig | None,
    chat_template: str | None,
    notify: Callable[[str], None],
    base: str | None = None,
) -> Found:
    loaded = [(folder.name, load_adapter(folder)) for folder in folders]
    first = loaded[0][1]
    if base is None and not first.base_name:
        raise ModelError(f"{folders[0] / CONFIG_FILE} does not name its base model (base_model_name_or_path)")
    own = current(folders[0]) / "chat_template.jinja"
    if chat_template is None and own.is_file():  # TRL and others save the template they trained with beside the adapter
        chat_template = str(own)
    model = ModelConfig(path=base or str(first.base_name), revision=None if base else first.revision)
    adapter = _combined(loaded, combination, notify)
    name = "+".join(name for name, _ in loaded)
    return _found(name, folders[0], model, adapter, DataConfig(chat_template=chat_template), {})


def _combined(
    loaded: Sequence[tuple[str, AdapterOnDisk]], combination: CombineConfig | None, notify: Callable[[str], None]
) -> AdapterOnDisk:
    for name, adapter in loaded:
        for note in adapter.notes:
            notify(f"{name}: {note}")
    if len(loaded) == 1 and combination is None:
        return loaded[0][1]
    return combine(loaded, combination or CombineConfig())


def _found(
    name: str,
    folder: Path,
    model: ModelConfig,
    adapter: AdapterOnDisk | None,
    data: DataConfig,
    facts: dict[str, Any],
    job: JobConfig | None = None,
) -> Found:
    tokenizer = loading.load_tokenizer(model)  # its errors say more of a folder that is none
    refuse(read_config(model), "no other program runs such layers, so there is nothing to export")
    renderer = Renderer(tokenizer, data)
    try:
        template = without_marks(renderer.chat_template)
    except ModelError:
        template = None  # plain text: nothing to carry along

    def documents(count: int) -> Sequence[np.ndarray]:
        assert job is not None
        return training_documents(job.data, renderer, job.objective.build().record, job.seed, count)

    source = Source(
        name=name,
        base=on_disk(model),
        model=model,
        adapter=adapter,
        tokenizer=tokenizer,
        chat_template=template,
        stop_tokens=renderer.stop_tokens if template is not None else _eos(tokenizer),
        documents=None if job is None else documents,
        facts=facts,
    )
    return Found(source, folder, renderer, job)


def _eos(tokenizer: Any) -> frozenset[int]:
    return frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def on_disk(model: ModelConfig) -> Path:
    """The folder of the base; a hub model's is in the hub's cache."""
    folder = Path(loading.locate(model.path))
    if folder.is_dir():
        return folder
    try:
        return Path(huggingface_hub.snapshot_download(model.path, revision=model.revision, allow_patterns=_BASE_FILES))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{model.path}: no such folder here, and the hub does not give it ({error}); name the folder of the base"
        ) from error


def _job(config: RunConfig, name: str) -> JobConfig:
    jobs = {job.name: job for job in config.jobs}
    if name not in jobs:
        raise ModelError(f"this run has no job {name!r}{did_you_mean(name, jobs)}")
    return jobs[name]


def _best(config: RunConfig, summary: dict[str, Any], notify: Callable[[str], None]) -> str:
    """The only job, or the one with the lowest held-out loss."""
    names = [job.name for job in config.jobs]
    if len(names) == 1:
        return names[0]
    best = summary.get("best_job")
    if best in names:
        notify(f"of {len(names)} adapters this is {best}, which has the lowest held-out loss; --adapter takes another")
        return best
    raise ModelError(f"the held-out losses of these jobs do not compare; choose with --adapter: {', '.join(names)}")


def _facts(config: RunConfig, jobs: Sequence[JobConfig], summary: dict[str, Any]) -> dict[str, Any]:
    """For the model card."""
    first = jobs[0]
    told = [summary.get("jobs", {}).get(job.name, {}) for job in jobs]
    return {
        "base": config.model.path,
        "data": sorted({source.path for job in jobs for source in job.data.train}),
        "objective": first.objective.type,
        "tuning": first.tuning,
        "adapters": [
            {
                "name": job.name,
                "type": None if job.trains_base else job.adapter.type,
                "rank": None if job.trains_base else job.adapter.rank,
                "steps": own.get("steps"),
                "held_out_loss": (own.get("best_eval") or {}).get("loss"),
                "train_tokens": own.get("train_tokens"),
            }
            for job, own in zip(jobs, told)
        ],
        "versions": summary.get("versions", {}),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
