"""The checkpointer of a run: adapters as `<job>/best` and `<job>/last`, checkpoints to resume from, parked jobs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.full_model import save_full
from lowrank.checkpoints.optimizer_state import flatten_optimizer, restore_optimizer
from lowrank.checkpoints.peft_config import describe_base, peft_incompatibility
from lowrank.checkpoints.peft_layout import AdapterOnDisk, save_adapter
from lowrank.checkpoints.run_folder import CHECKPOINTS
from lowrank.checkpoints.run_state import JobState, RunCheckpoint, save_checkpoint
from lowrank.checkpoints.value_head import write_value_head
from lowrank.errors import OutputError, raise_all
from lowrank.models.loading.pretrained import locate
from lowrank.objectives import needs
from lowrank.train.engine import Engine
from lowrank.train.job import Job, JobProgress
from lowrank.train.loss_scale import LossScale
from lowrank.train.new_job import VALUE_HEAD

CHAT_TEMPLATE = "chat_template.jinja"
DATALOADER = "dataloader"
"""The key of a job's state in a checkpoint that has the position of its dataloader."""
_OLD_DATALOADER = "feed"
"""The same key in checkpoints before 2026-12."""


class Checkpointer:
    """Writes adapters and checkpoints into one run folder, each atomically, and parks and restores jobs."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        save_total_limit: int | None,
        run_state: Callable[[], dict[str, Any]],
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`run_state` returns what a checkpoint holds beside the jobs, as plain JSON. `chat_templates`: those of jobs
        that are trained with another than the tokenizer's, which are written beside their adapters."""
        self.engine = engine
        self.folder = folder
        self.run_state = run_state
        self.save_total_limit = save_total_limit
        self.chat_templates = dict(chat_templates or {})
        self.parked: dict[str, JobState] = {}
        """States of jobs without a slot that continue later; every checkpoint has them, too."""
        base = engine.base
        self.base = describe_base(base.model, locate(base.name), base.revision)

    def incompatibilities(self, jobs: Sequence[Job]) -> list[str]:
        """Return notices about adapters that PEFT cannot load, or loads with restrictions."""
        slots = [self.engine.bank.slots[job.slot] for job in jobs if job.slot >= 0]
        found = [peft_incompatibility(self.base, slot.ranks, slot.config.as_saved().peft) for slot in slots]
        return sorted({problem for problem in found if problem})

    def save_adapter(self, job: Job, which: str) -> Path:
        """Write a job's adapter (a full-parameter job: the whole model) as `<job>/<which>`."""
        path = self.folder / job.name / which
        value_D = self.engine.jobs[job.slot].value_D
        critic = needs(self.engine.jobs[job.slot].objective, "token_values")

        def also(partial: Path) -> None:
            self.engine.base.tokenizer.save_pretrained(partial)
            if job.name in self.chat_templates:
                (partial / CHAT_TEMPLATE).write_text(self.chat_templates[job.name], encoding="utf-8")
            if value_D is not None:
                write_value_head(partial, value_D.detach(), critic=critic)

        with self.engine.eval_weights([job.slot]):
            if job.slot == BASE_SLOT:
                save_full(path, self.engine.base.model, also)
            else:
                save_adapter(
                    path, self._adapter(job), self.base, is_reward_model=value_D is not None and not critic, also=also
                )
        return path

    def checkpoint(self, iteration: int, jobs: Sequence[Job]) -> Path:
        """Write the state of all jobs; finished ones too, which may be resumed with more steps."""
        states = [*(self._state(job) for job in jobs), *self.parked.values()]
        return save_checkpoint(
            self.folder / CHECKPOINTS,
            iteration,
            states,
            self.run_state(),
            self.base,
            save_total_limit=self.save_total_limit,
        )

    def restore(self, checkpoint: RunCheckpoint, jobs: Sequence[Job], parked: Collection[str] = ()) -> int:
        """Restore every job from a checkpoint; return the iteration to continue from. `parked`: names of jobs without a
        slot. OutputError if the checkpoint has other jobs."""
        saved = {state.name: state for state in checkpoint.jobs}
        self.parked = {name: saved.pop(name) for name in parked if name in saved}
        problems = [f"{name}: in the checkpoint, not in this run" for name in saved.keys() - {job.name for job in jobs}]
        problems += [f"{job.name}: not in the checkpoint" for job in jobs if job.name not in saved]
        problems += [_shorter(job, saved[job.name]) for job in jobs if job.name in saved]
        problems = list(filter(None, problems))
        raise_all(OutputError, f"{checkpoint.path} cannot be resumed with these jobs", problems)
        for job in jobs:
            self._restore(job, saved[job.name])
        return checkpoint.step

    def park(self, job: Job) -> None:
        """Keep the whole state of a job, so that its slot can be given to another."""
        self.parked[job.name] = _deep_copy(self._state(job))

    def unpark(self, job: Job) -> None:
        """Restore a parked job, which has a slot again, to the bit."""
        self._restore(job, self.parked.pop(job.name))

    def copy(self, job: Job, name: str) -> None:
        """Park a copy of a running job as `name`, without its evaluations."""
        self.parked[name] = _as_fork(_deep_copy(self._state(job)), name)

    def copy_parked(self, parked: str, name: str) -> None:
        """Park a copy of a parked job as `name`, without its evaluations."""
        self.parked[name] = _as_fork(_deep_copy(self.parked[parked]), name)

    def _adapter(self, job: Job) -> AdapterOnDisk:
        saved = self.engine.bank.saved(job.slot)
        return AdapterOnDisk(saved.config, saved.tensors, saved.ranks)

    def _state(self, job: Job) -> JobState:
        trained = self.engine.jobs[job.slot]
        optimizer = flatten_optimizer(trained.optimizer, trained.parameters)
        state = {"progress": dataclasses.asdict(job.progress), DATALOADER: job.dataloader.state()}
        if trained.scale is not None:
            state["loss_scale"] = dataclasses.asdict(trained.scale)
        value_D = None if trained.value_D is None else trained.value_D.detach()
        critic = value_D is not None and needs(trained.objective, "token_values")
        if job.slot == BASE_SLOT:
            parameters = {name: parameter.detach() for name, parameter in _of_base(trained.parameters).items()}
            return JobState(job.name, state, optimizer, parameters=parameters, value_D=value_D, critic=critic)
        rest = self.engine.bank.state(job.slot)
        adapter = self._adapter(job)
        return JobState(job.name, state, optimizer, adapter, value_D=value_D, critic=critic, adapter_state=rest)

    def _restore(self, job: Job, saved: JobState) -> None:
        trained = self.engine.jobs[job.slot]
        restore_optimizer(
            trained.optimizer, trained.parameters, saved.optimizer
        )  # first: a blockwise one decides what is trained
        if job.slot == BASE_SLOT:
            _copy_into(_of_base(trained.parameters), saved.parameters)
            trained.refresh()
        elif saved.adapter_state:
            self.engine.bank.load_state(job.slot, saved.adapter_state)
        else:
            self.engine.bank.load(job.slot, saved.tensors)
        if trained.value_D is not None:
            self.engine.load_value_head(job.slot, saved.value_D)
        if trained.scale is not None and "loss_scale" in saved.state:
            trained.scale = LossScale(**saved.state["loss_scale"])
        job.progress = JobProgress(**saved.state["progress"])
        trained.step = job.progress.step
        job.dataloader.load_state(saved.state[DATALOADER if DATALOADER in saved.state else _OLD_DATALOADER])
        if job.progress.finished == "done" and job.progress.step < job.num_steps:
            job.progress.finished = None  # it has more steps now


def _shorter(job: Job, saved: JobState) -> str:
    """Return the problem of a running job that has taken more steps than it now has in all; else an empty text."""
    progress = JobProgress(**saved.state["progress"])
    if progress.finished is not None or progress.step < job.num_steps:
        return ""
    return (
        f"{job.name}: it has taken {progress.step} steps, and now ends at step {job.num_steps}; set more than "
        f"{progress.step} (max_steps, num_train_epochs), or use {job.name}/last as it is"
    )


def _deep_copy(state: JobState) -> JobState:
    """Return a deep copy of a state, since the job that it is of continues to train."""
    adapter = state.adapter
    if adapter is not None:
        adapter = dataclasses.replace(
            adapter, tensors={name: tensor.clone() for name, tensor in adapter.tensors.items()}
        )
    return dataclasses.replace(
        state,
        state=json.loads(json.dumps(state.state)),
        optimizer={name: tensor.clone() for name, tensor in state.optimizer.items()},
        adapter=adapter,
        value_D=None if state.value_D is None else state.value_D.clone(),
        adapter_state={name: tensor.clone() for name, tensor in state.adapter_state.items()},
    )


def _as_fork(state: JobState, name: str) -> JobState:
    """Return a state under another name, without evaluations."""
    kept = JobProgress(**state.state["progress"])
    progress = JobProgress(step=kept.step, skipped=kept.skipped)
    return dataclasses.replace(state, name=name, state={**state.state, "progress": dataclasses.asdict(progress)})


def _of_base(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in parameters.items() if name != VALUE_HEAD}


@torch.no_grad()
def _copy_into(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    problems = [f"{name}: missing" for name in parameters if name not in tensors]
    raise_all(OutputError, "the checkpoint does not hold all parameters of the base", problems)
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
