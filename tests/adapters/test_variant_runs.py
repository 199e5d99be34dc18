"""Whole runs: every variant in one of them, stopped and resumed, next to others and alone."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.config import RunConfig
from lowrank.errors import LowrankError
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.report.events import StepDone
from lowrank.settings import configs_in
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca
from tests.pipelines.test_train import Ear, run, weights

VARIANTS: dict[str, Any] = {**configs_in("lowrank.adapters.variants")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(folder / "model")
    write_alpaca(folder / "train.json", 24)
    return folder


def settings(world: Path, out: Path, *names: str) -> dict[str, Any]:
    jobs = []
    for number, name in enumerate(names or [name for name in VARIANTS if name != "loftq"]):
        adapter: dict[str, Any] = {"type": name, "rank": 4}
        if "dropout" not in VARIANTS[name].refused:
            adapter["dropout"] = 0.1
        adapter |= {"loraplus_lr_ratio": 4.0} if name in ("rslora", "dora") else {}
        adapter |= {"block_size": 8} if name == "oft" else {}
        jobs.append({"name": chr(ord("a") + number), "adapter": adapter, "seed": 7})
    return {
        "model": {"path": str(world / "model"), "dtype": "bfloat16", "device": "cpu"},
        "data": {"train": [str(world / "train.json")], "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
        "output_dir": str(out),
        "save_steps": 2,
        "max_steps": 4,
        "jobs": jobs,
    }


@pytest.mark.slow
def test_all_variants_in_one_run_resume_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    _, whole = run(settings(world, tmp_path / "whole"))

    class Stopper(Ear):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, StepDone) and event.job == "a" and event.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    stopper, given = Stopper(), settings(world, tmp_path / "cut")
    assert train(RunConfig(**given), reporters=[stopper])["interrupted"]
    _, rest = run({**given, "resume": True})
    for job in given["jobs"]:
        losses = whole.losses(job["name"])
        assert len(losses) == 4
        assert stopper.losses(job["name"]) + rest.losses(job["name"]) == losses, job
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    trained = open_inference_model(str(tmp_path / "whole"), which="last", notify=str)
    assert len(trained.slots) == len(given["jobs"]) + 1  # and the base


@pytest.mark.parametrize("name", ["dora", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_job_alone_is_the_same_job(name: str, world: Path, tmp_path: Path) -> None:
    float32 = {"path": str(world / "model"), "dtype": "float32", "device": "cpu"}
    _, together = run({**settings(world, tmp_path / "all", "oft", name, "vera"), "model": float32})
    _, alone = run({**settings(world, tmp_path / "one", name), "model": float32})
    assert alone.losses("a") == pytest.approx(together.losses("b"), rel=1e-5)


def test_what_cannot_be_done_is_said_before_anything_loads(world: Path, tmp_path: Path) -> None:
    given = settings(world, tmp_path / "run", "loftq", "vera", "ia3")
    given["jobs"][1]["adapter"] |= {"rank_pattern": {"q_proj": 2}}
    with pytest.raises((LowrankError, ValueError), match="all layers share A and B"):
        RunConfig(**given)
    del given["jobs"][1]["adapter"]["rank_pattern"]
    with pytest.raises((LowrankError, ValueError), match="makes up for what quantization lost"):
        RunConfig(**given)
    assert not (tmp_path / "run").exists()


def test_adapter_files_say_what_they_are(world: Path, tmp_path: Path) -> None:
    run({**settings(world, tmp_path / "run", "pissa", "vera", "ia3"), "max_steps": 1})
    fields = [json.loads((tmp_path / f"run/{job}/last/adapter_config.json").read_text()) for job in "abc"]
    assert [each["peft_type"] for each in fields] == ["LORA", "VERA", "IA3"]
    assert (fields[0]["r"], fields[0]["lora_alpha"]) == (8, 16)
    assert "A `ia3` adapter with" in (tmp_path / "run/c/last/README.md").read_text()
