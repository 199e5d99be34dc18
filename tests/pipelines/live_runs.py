"""Runs that something happens to while they train: a tiny base and data, and a reporter that acts after given steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lowrank.config import RunConfig
from lowrank.pipelines.train import train
from lowrank.report.events import Event, Notice, StepDone
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca


def make_world(folder: Path) -> Path:
    """A checkpoint and a few rows."""
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 24)
    write_alpaca(folder / "eval.json", 4, start=100)
    return folder


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Two jobs with dropout, shuffling and a schedule."""
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "train.json")], "eval": [str(world / "eval.json")], "batch_size": 4},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"type": "cosine", "warmup_steps": 2},
        "output_dir": str(out),
        "save_steps": None,
        "eval_steps": 4,
        "max_steps": 12,
        "jobs": [{"name": "a", "adapter": {"rank": 4, "dropout": 0.1}}, {"name": "b", "adapter": {"rank": 8}}],
        **changes,
    }


class ScriptedReporter:
    """A reporter that calls functions after given steps of a job, which send commands, and keeps every event."""

    def __init__(self, run: Path, **plan: Callable[[], Any]) -> None:
        """`a3=function`: called after step 3 of job a."""
        self.run, self.plan = run, plan
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone) and (act := self.plan.pop(f"{event.job.replace('-', '_')}{event.step}", None)):
            act()

    def close(self) -> None:
        pass

    def losses(self, job: str) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone) and event.job == job]


def run(given: dict[str, Any], **plan: Callable[[], Any]) -> tuple[dict[str, Any], ScriptedReporter]:
    reporter = ScriptedReporter(Path(given["output_dir"]), **plan)
    summary = train(RunConfig(**given), reporters=[reporter])
    failed = [event.text for event in reporter.events if isinstance(event, Notice) and "receives no more" in event.text]
    assert not reporter.plan, f"never happened: {list(reporter.plan)}; {failed}"
    return summary, reporter


class Killed(BaseException):
    """What a reporter throws, as kill -9 would come: nothing is saved on the way out."""


def kill() -> None:
    raise Killed


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = out.glob("*/last/adapter_model.safetensors")
    return {f"{file.parent.parent.name}/{name}": value for file in files for name, value in load_file(file).items()}
