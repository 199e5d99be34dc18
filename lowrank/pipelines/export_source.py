"""What an export starts from: a run, an adapter or a model, found and described before the base's weights load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lowrank.models.loading.pretrained as loading
from lowrank.checkpoints.adapter_folder import check_which
from lowrank.checkpoints.own_tokens import learn_tokens
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter
from lowrank.checkpoints.run_folder import CONFIG as RUN_CONFIG
from lowrank.checkpoints.value_head import is_critic, read_value_head
from lowrank.config import JobConfig, RunConfig, settings_of_run
from lowrank.data.chat.rendering import Renderer
from lowrank.data.chat.template import without_marks
from lowrank.data.config import SourceConfig
from lowrank.errors import DataError, ModelError
from lowrank.export.merge.combine import CombineConfig, combine
from lowrank.export.source import Source
from lowrank.export.verify.held_out import HeldOut, from_data, from_questions, from_source, training_documents
from lowrank.foreign_files import find_json
from lowrank.models.config import ModelConfig
from lowrank.models.layer_wrappers import refuse_wrapped
from lowrank.models.positions import positions_of
from lowrank.notices import log_notice
from lowrank.pipelines.adapter_on_base import on_base_of, on_disk
from lowrank.pipelines.artifacts import (
    ModelArtifacts,
    adapter_folder,
    artifacts_of_folder,
    artifacts_of_run,
    job_of,
    unused_name,
)
from lowrank.pipelines.resolve import ArtifactKind, Resolved, resolve
from lowrank.planning.simulation import read_config
from lowrank.report.summary import SUMMARY
from lowrank.segments import Segment


@dataclass(frozen=True)
class ResolvedSource:
    """A source, and what is needed to ask it about its own data."""

    source: Source
    folder: Path
    """What was named: nothing is written inside it."""
    renderer: Renderer
    job: JobConfig | None = None

    def default_place(self, targets: Sequence[str]) -> Path:
        """Where these targets go if nobody says it: beside the run, never in it."""
        folder = self.folder if self.folder.is_dir() else Path(self.source.name.replace("/", "-"))
        beside = Path(f"{folder.resolve() if folder.exists() else folder}-export")
        place = beside / self.source.name.replace("/", "-")
        return place.with_name(f"{place.name}-{targets[0]}") if len(targets) == 1 else place

    def held_out(self, prompts: SourceConfig | None, *, documents: int = 16) -> HeldOut:
        """Documents to compare on: rows of `prompts`, else the run's held-out rows, else general questions."""
        seed = self.job.seed if self.job else 0
        if prompts is not None:
            return from_source(prompts, self.renderer, seed, documents=documents)
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
    base: str | None = None,
    notify: Callable[[str], None] = log_notice,
) -> ResolvedSource:
    """What `path` names (resolve.py): a run, one of its checkpoints or jobs, an adapter (PEFT's too), or a model.

    `adapters`: names of a run's jobs, or more adapter folders of the same base; several are combined. Without a name a
    run gives its best job. Raises ModelError, ConfigError.
    """
    check_which(which)
    named = resolve(path)
    if named.of_run:
        return _of_run(named, adapters, which, combination, chat_template, notify, base)
    more = [replace(resolve(name), folder=adapter_folder(name, "--adapter")) for name in adapters]
    if named.kind is ArtifactKind.ADAPTER:
        return _of_adapters([named, *more], combination, chat_template, notify, base)
    if more:
        if base is not None:
            raise ModelError(f"--base: {path} is the base already; leave one of them out")
        return _of_adapters(more, combination, chat_template, notify, path)
    found = artifacts_of_folder(named, chat_template=chat_template, base=base)
    return _described(named.name, named.folder, found, None, {})


def _of_run(
    named: Resolved,
    names: Sequence[str],
    which: str,
    combination: CombineConfig | None,
    chat_template: str | None,
    notify: Callable[[str], None],
    base: str | None,
) -> ResolvedSource:
    config = settings_of_run(named.folder / RUN_CONFIG)
    summary = find_json(named.folder / SUMMARY) or {}
    if named.job is not None and names:
        raise ModelError(
            f"{named.path} is one job; to combine several, give the run and its jobs "
            f"(--adapter {named.job},..., adapters=[...])"
        )
    chosen = names or [named.job or _best(config, summary, notify)]
    jobs = [job_of(config, name) for name in dict.fromkeys(chosen)]
    found = artifacts_of_run(named, config, jobs, which=which, chat_template=chat_template, base=base, notify=notify)
    facts = _facts(config, jobs, summary)
    if found.trained_base is not None:
        return _described(jobs[0].name, named.folder, found, None, facts | {"base": config.model.path}, jobs[0])
    for job in jobs:
        if job.name not in found.adapters:
            raise ModelError(
                f"{named.folder / job.name} holds nothing trained yet; go on with resume=true, or choose another job"
            )
    adapter = _combined(list(found.adapters.items()), found.model, combination, notify)
    return _described("+".join(found.adapters), named.folder, found, adapter, facts, jobs[0], notify=notify)


def _of_adapters(
    named: Sequence[Resolved],
    combination: CombineConfig | None,
    chat_template: str | None,
    notify: Callable[[str], None],
    base: str | None,
) -> ResolvedSource:
    first = named[0]
    found = artifacts_of_folder(replace(first, kind=ArtifactKind.ADAPTER), chat_template=chat_template, base=base)
    folders = _by_name(named)
    found = replace(found, data=found.data_of.get(first.name, found.data), adapters=folders)
    adapter = _combined(list(folders.items()), found.model, combination, notify)
    return _described("+".join(folders), first.folder, found, adapter, {}, notify=notify)


def _by_name(named: Sequence[Resolved]) -> dict[str, Path]:
    """The folders of adapters by their names; jobs of several runs may have one name, which then gets a number."""
    folders: dict[str, Path] = {}
    for each in named:
        folders[unused_name(each.name, folders)] = each.folder
    return folders


def _combined(
    folders: Sequence[tuple[str, Path]],
    model: ModelConfig,
    combination: CombineConfig | None,
    notify: Callable[[str], None],
) -> AdapterOnDisk:
    loaded = [(name, on_base_of(load_adapter(folder), model)) for name, folder in folders]
    for name, adapter in loaded:
        for note in adapter.notes:
            notify(f"{name}: {note}")
    if len(loaded) == 1 and combination is None:
        return loaded[0][1]
    rule = combination or CombineConfig()
    combined = combine(loaded, rule)
    notify(_how_combined([name for name, _ in loaded], rule))
    return combined


def _how_combined(names: Sequence[str], rule: CombineConfig) -> str:
    """By what rule and weights adapters have become one, for people."""
    weights = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, rule.weights or (1.0,) * len(names)))
    kept = f", density {rule.density:g}" if rule.method in ("ties", "dare", "dare_ties") else ""
    others = "; another rule: --combine and --weights, combine={...}" if rule == CombineConfig() else ""
    return f"one adapter of {len(names)}: {rule.method}, weights {weights}{kept}{others}"


def _value_head(found: ModelArtifacts, notify: Callable[[str], None]) -> tuple[torch.Tensor | None, bool]:
    """(D) That of what is exported, and whether it gives rewards. Those of several adapters belong to hidden states
    that the combined one lacks."""
    folders = list(found.adapters.values()) or ([found.trained_base[1]] if found.trained_base else [])
    heads = [(value_D, folder) for folder in folders if (value_D := read_value_head(folder)) is not None]
    if heads and len(folders) > 1:
        notify("several adapters as one give no rewards: their value heads are left out")
        return None, False
    return (heads[0][0], not is_critic(heads[0][1])) if heads else (None, False)


def _described(
    name: str,
    folder: Path,
    found: ModelArtifacts,
    adapter: AdapterOnDisk | None,
    facts: dict[str, Any],
    job: JobConfig | None = None,
    *,
    notify: Callable[[str], None] = log_notice,
) -> ResolvedSource:
    model = found.model
    tokenizer = loading.load_tokenizer(model)  # its errors say more of a folder that is none
    brought = learn_tokens(tokenizer, found.adapters)
    for notice in brought:
        notify(notice)
    shape = read_config(model)
    refuse_wrapped(shape, "no other program runs such layers, so there is nothing to export")
    value_D, is_reward_model = _value_head(found, notify)
    data = found.data.within(positions_of(shape))
    job = job and job.model_copy(update={"data": job.data.within(positions_of(shape))})
    renderer = Renderer(tokenizer, data)
    try:
        template = without_marks(renderer.chat_template)
    except ModelError:
        template = None  # plain text: nothing to carry along

    def documents(count: int) -> Sequence[Segment]:
        assert job is not None
        return training_documents(job.data, renderer, job.objective.build().record, job.seed, count)

    source = Source(
        name=name,
        base=on_disk(model),
        model=model,
        adapter=adapter,
        tokenizer=tokenizer,
        own_tokens=bool(brought),
        chat_template=template,
        stop_tokens=renderer.stop_tokens if template is not None else _eos(tokenizer),
        documents=None if job is None else documents,
        value_head=value_D,
        is_reward_model=is_reward_model,
        facts=facts,
    )
    return ResolvedSource(source, folder, renderer, job)


def _eos(tokenizer: Any) -> frozenset[int]:
    return frozenset(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))


def _best(config: RunConfig, summary: dict[str, Any], notify: Callable[[str], None]) -> str:
    """The only job, or the one with the lowest held-out loss."""
    names = [job.name for job in config.jobs]
    if len(names) == 1:
        return names[0]
    best = summary.get("best_job")
    if best in names:
        notify(
            f"of {len(names)} adapters this is {best}, which has the lowest held-out loss; to take another: --adapter "
            "NAME, adapters=..."
        )
        return best
    raise ModelError(
        "the held-out losses of these jobs do not compare; choose one (--adapter NAME, adapters=...): "
        f"{', '.join(names)}"
    )


def _facts(config: RunConfig, jobs: Sequence[JobConfig], summary: dict[str, Any]) -> dict[str, Any]:
    """For the model card."""
    first = jobs[0]
    summaries = [summary.get("jobs", {}).get(job.name, {}) for job in jobs]
    return {
        "base": config.model.path,
        "data": sorted({source.path for job in jobs for source in job.data.train}),
        "pictures": any(own.get("pictures") for own in summaries),
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
            for job, own in zip(jobs, summaries)
        ],
        "versions": summary.get("versions", {}),
    }
