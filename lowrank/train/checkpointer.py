"""Checkpoints of a running run: `<job>/best`, `<job>/last`, and those it resumes from."""

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
    """Writes what the loop asks for into one run folder; every write is whole or not there."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        save_total_limit: int | None,
        run_state: Callable[[], dict[str, Any]],
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """`run_state` gives what a checkpoint should hold beside the jobs; plain JSON. `chat_templates`: of jobs that
        are trained with another than the tokenizer's own, which is then written beside their adapters."""
        self.engine = engine
        self.folder = folder
        self.run_state = run_state
        self.save_total_limit = save_total_limit
        self.chat_templates = dict(chat_templates or {})
        self.parked: dict[str, JobState] = {}
        """Jobs that have lost their slot and will go on later, whole; every checkpoint has them too."""
        base = engine.base
        self.base = describe_base(base.model, locate(base.name), base.revision)

    def incompatibilities(self, jobs: Sequence[Job]) -> list[str]:
        """What people should know about loading these adapters with PEFT."""
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
        """Write the state of all jobs, finished ones too: they may be told to go on for longer."""
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
        """Put every job back to where it was; the iteration to go on from. `parked`: names of those without a slot.
        OutputError if the jobs are others."""
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
        """Keep all there is of a job, so that its slot can go to another."""
        self.parked[job.name] = _apart(self._state(job))

    def unpark(self, job: Job) -> None:
        """Put a job that was parked, and has a slot again, back to where it was, to the bit."""
        self._restore(job, self.parked.pop(job.name))

    def copy(self, job: Job, name: str) -> None:
        """Park a copy of a running job as `name`, whose best adapter is still to come."""
        self.parked[name] = _as_fork(_apart(self._state(job)), name)

    def copy_parked(self, parked: str, name: str) -> None:
        """The same of a job that is parked."""
        self.parked[name] = _as_fork(_apart(self.parked[parked]), name)

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
        )  # first: it may decide what is trained
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
            job.progress.finished = None  # more steps were asked for since


def _shorter(job: Job, saved: JobState) -> str:
    """What is wrong where a job that still learned is now to have ended before; else nothing."""
    progress = JobProgress(**saved.state["progress"])
    if progress.finished is not None or progress.step < job.num_steps:
        return ""
    return (
        f"{job.name}: it has taken {progress.step} steps already and is to take {job.num_steps}; give it more than "
        f"{progress.step} (max_steps, num_train_epochs), or use {job.name}/last as it is"
    )


def _apart(state: JobState) -> JobState:
    """The same with tensors of its own: what it was taken from goes on."""
    adapter = state.adapter
    if adapter is not None:
        adapter = dataclasses.replace(adapter, tensors={name: own.clone() for name, own in adapter.tensors.items()})
    return dataclasses.replace(
        state,
        state=json.loads(json.dumps(state.state)),
        optimizer={name: own.clone() for name, own in state.optimizer.items()},
        adapter=adapter,
        value_D=None if state.value_D is None else state.value_D.clone(),
        adapter_state={name: own.clone() for name, own in state.adapter_state.items()},
    )


def _as_fork(state: JobState, name: str) -> JobState:
    """A state under another name, with no evaluation yet that another could be better than."""
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
