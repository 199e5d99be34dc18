"""A run that live commands have changed, gone on with from Python; and what a run in this process keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank

ROWS = [{"prompt": f"What is {number}?", "completion": f"A number, {number}."} for number in range(12)]
QUICK = {"eval_steps": None, "max_steps": 400, "progress": False}


def trained_until(folder: Path, command: Callable[[lowrank.LiveRun], object], **settings: Any) -> lowrank.TrainedRun:
    """A run that was given the command while it trained, and then ended."""
    out: list[lowrank.TrainedRun] = []
    training = threading.Thread(
        target=lambda: out.append(
            lowrank.train(model="lowrank/tiny", data=ROWS, output_dir=str(folder), **QUICK, **settings)
        )
    )
    training.start()
    live = lowrank.LiveRun(folder, timeout=100, wait=100)
    command(live)
    live.end()
    training.join(100)
    return out[0]


def steps(run: lowrank.TrainedRun) -> dict[str, int]:
    return {name: job["steps"] for name, job in run.summary["jobs"].items()}


def test_settings_set_live_stay_and_others_may_change(tmp_path: Path) -> None:
    """config.json of the run has what was set; a change beside it is no other run."""
    run = trained_until(tmp_path / "run", lambda live: live.set("default", {"optimizer.learning_rate": 1e-5}))
    (taken,) = steps(run).values()
    assert repr(lowrank.LiveRun(run.path)) == f"LiveRun({str(run.path)!r}, default: interrupted)"
    again = lowrank.TrainedRun(run.path).resume(objects=[ROWS], progress=False, max_steps=taken + 1)
    assert steps(again) == {"default": taken + 1}
    assert again.metrics()["learning_rate"].iloc[-1] <= 1e-5
    with pytest.raises(lowrank.OutputError, match=r"adapter\.rank"):
        lowrank.TrainedRun(run.path).resume(objects=[ROWS], max_steps=taken + 2, adapter={"rank": 4})


def test_jobs_that_came_live_are_known_to_the_run_that_train_returned(tmp_path: Path) -> None:
    """Their rows are in this process's memory, and what is changed is changed for them too."""

    def command(live: lowrank.LiveRun) -> None:
        live.add({"name": "more", "data": ROWS[:6], "adapter": {"rank": 2}})
        live.clone("default", {"optimizer.learning_rate": 1e-3}, new_name="hot")

    run = trained_until(tmp_path / "run", command)
    assert set(steps(run)) == {"default", "more", "hot"}
    most = max(steps(run).values()) + 1
    assert steps(run.resume(progress=False, max_steps=most)) == dict.fromkeys(("default", "more", "hot"), most)


def as_conversation(row: dict[str, Any], columns: Any, tags: Any) -> lowrank.Conversation:
    return lowrank.Conversation(
        (lowrank.Message("user", row["prompt"]), lowrank.Message("assistant", row["completion"]))
    )


def test_a_run_knows_its_own_objects_where_it_is_loaded_and_exported(tmp_path: Path) -> None:
    run = lowrank.train(
        model="lowrank/tiny",
        data={"train": {"rows": ROWS, "format": as_conversation}, "validation_split": 0.25},
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        progress=False,
    )
    assert run.export("peft", tmp_path / "out")["passed"]
    run.load().close()


def test_the_callers_random_numbers_go_on_as_if_nothing_had_been_trained(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run = lowrank.train(model="lowrank/tiny", data=ROWS, output_dir=str(tmp_path / "run"), max_steps=1, progress=False)
    run.resume(max_steps=2, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
