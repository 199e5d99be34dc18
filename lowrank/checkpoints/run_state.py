"""Checkpoints of a run: everything from which it goes on to the same bits.

    <root>/step-000100/
        state.json                    step, jobs, sizes of all files, and what the run itself wants to know
        <job>/state.json              the job's counters and cursors
        <job>/optimizer.safetensors
        <job>/adapter_config.json, adapter_model.safetensors     an adapter, as PEFT reads it
        <job>/adapter_state.safetensors                          what of an adapter its files do not hold
        <job>/model.safetensors                                  or all parameters of a full-parameter job
        <job>/value_head.safetensors                             of a job that has one

A folder named `step-...` is complete: it got its name last. Older ones go once the new one is durable.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.adapter_folder import CONFIG_FILE
from lowrank.checkpoints.atomic import new_folder, remove
from lowrank.checkpoints.peft_config import BaseDescription
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter, write_adapter
from lowrank.checkpoints.steps import SCHEMA, STATE_FILE, list_checkpoints, read_top
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.checkpoints.value_head import read_value_head, write_value_head
from lowrank.errors import OutputError
from lowrank.foreign_files import read_json

OPTIMIZER_FILE = "optimizer.safetensors"
PARAMETER_FILE = "model.safetensors"
ADAPTER_STATE_FILE = "adapter_state.safetensors"


@dataclass(frozen=True)
class JobState:
    """One job at one instant. It has an adapter, or all parameters of the model."""

    name: str
    state: dict[str, Any]
    """Anything that JSON can say: steps, cursors, counters, best loss."""
    optimizer: dict[str, torch.Tensor]
    """See optimizer_state.py."""
    adapter: AdapterOnDisk | None = None
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    """Of a full-parameter job, by name."""
    value_D: torch.Tensor | None = None
    """The value head of a reward model, or of PPO's critic."""
    critic: bool = False
    """The value head is PPO's critic."""
    adapter_state: dict[str, torch.Tensor] = field(default_factory=dict)
    """See `Bank.state`."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What is trained."""
        return self.parameters if self.adapter is None else self.adapter.tensors


@dataclass(frozen=True)
class RunCheckpoint:
    """A run at one instant."""

    path: Path
    step: int
    state: dict[str, Any]
    jobs: tuple[JobState, ...]


def save_checkpoint(
    root: Path,
    step: int,
    jobs: Sequence[JobState],
    state: dict[str, Any],
    base: BaseDescription,
    *,
    save_total_limit: int | None,
) -> Path:
    """Write `<root>/step-...`, durably; then delete the oldest until `save_total_limit` (None: any number) are left.

    `state` is the run's own part of state.json. Tensors are written in the dtype they have.
    """
    path = root / f"step-{step:06d}"
    with new_folder(path) as partial:
        for job in jobs:
            _write_job(partial / job.name, job, base)
        sizes = {file.relative_to(partial).as_posix(): file.stat().st_size for file in _files(partial)}
        top = {"schema": SCHEMA, "step": step, "jobs": [job.name for job in jobs], "state": state, "bytes": sizes}
        _write_json(partial / STATE_FILE, top)
    if save_total_limit is not None:
        others = [other for other in list_checkpoints(root) if other != path]
        for oldest in others[: max(0, len(others) + 1 - save_total_limit)]:
            remove(oldest)
    return path


def load_checkpoint(path: Path) -> RunCheckpoint:
    """Read a checkpoint. Raises OutputError with every file that is missing or damaged."""
    top = read_top(path)
    jobs = tuple(_read_job(path / name, name) for name in top["jobs"])
    return RunCheckpoint(path, top["step"], top["state"], jobs)


def _write_job(folder: Path, job: JobState, base: BaseDescription) -> None:
    folder.mkdir()
    _write_json(folder / STATE_FILE, job.state)
    write_tensors(folder / OPTIMIZER_FILE, job.optimizer)
    if job.adapter is not None:
        write_adapter(folder, job.adapter, base)
        if job.adapter_state:
            write_tensors(folder / ADAPTER_STATE_FILE, job.adapter_state)
    else:
        write_tensors(folder / PARAMETER_FILE, job.parameters)
    if job.value_D is not None:
        write_value_head(folder, job.value_D, critic=job.critic)


def _read_job(folder: Path, name: str) -> JobState:
    state = read_json(folder / STATE_FILE, OutputError)
    optimizer = read_tensors(folder / OPTIMIZER_FILE, OutputError)
    value_D = read_value_head(folder)
    if (folder / CONFIG_FILE).exists():
        rest = folder / ADAPTER_STATE_FILE
        adapter_state = read_tensors(rest, OutputError) if rest.exists() else {}
        return JobState(name, state, optimizer, load_adapter(folder), value_D=value_D, adapter_state=adapter_state)
    parameters = read_tensors(folder / PARAMETER_FILE, OutputError)
    return JobState(name, state, optimizer, parameters=parameters, value_D=value_D)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    # json writes the shortest digits that read back as the same float
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
