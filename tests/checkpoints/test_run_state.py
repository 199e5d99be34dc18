"""Checkpoints are complete or not there, and hold what was put in, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lowrank.adapters.variants import lora
from lowrank.checkpoints.atomic import is_leftover, recover
from lowrank.checkpoints.peft_config import BaseDescription
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.checkpoints.run_state import JobState, load_checkpoint, save_checkpoint
from lowrank.checkpoints.steps import latest_checkpoint, list_checkpoints
from lowrank.errors import OutputError

BASE = BaseDescription("tiny")
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def a_job(name: str, step: int, dtype: torch.dtype = torch.float32) -> JobState:
    """Every tensor and number of it says `step`."""
    config = lora.LoraConfig(rank=2, alpha=3, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 3})
    shapes = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (8, 2), f"{V}.lora_A.weight": (3, 8),
              f"{V}.lora_B.weight": (8, 3)}  # fmt: skip
    tensors = {name: torch.full(shape, float(step), dtype=dtype) for name, shape in shapes.items()}
    optimizer = {f"{name}.exp_avg": value + 0.5 for name, value in tensors.items()}
    adapter = AdapterOnDisk(config, tensors, {Q: (2, 3.0), V: (3, 3.0)})
    return JobState(name, {"step": step, "best": 1 / 3, "nested": {"cursor": [step, 2**63]}}, optimizer, adapter)


def save(root: Path, step: int, limit: int | None = None, **state: Any) -> Path:
    jobs = [a_job("r8", step), a_job("r64", step)]
    return save_checkpoint(root, step, jobs, {"tick": step, **state}, BASE, save_total_limit=limit)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    adapter_job = a_job("a", 7, torch.float64)
    for tensors in (adapter_job.tensors, adapter_job.optimizer):
        for value in tensors.values():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=torch.float64))
    full = JobState(
        "full", {"step": 7}, {}, parameters={"norm.weight": torch.randn(5).bfloat16(), "b": torch.ones(2, 3).T}
    )
    path = save_checkpoint(
        tmp_path, 7, [adapter_job, full], {"loss": 0.1 + 0.2, "none": None}, BASE, save_total_limit=1
    )
    assert path == tmp_path / "step-000007"
    loaded = load_checkpoint(path)
    assert (loaded.path, loaded.step, loaded.state) == (path, 7, {"loss": 0.1 + 0.2, "none": None})
    assert [job.name for job in loaded.jobs] == ["a", "full"]
    for job, original in zip(loaded.jobs, [adapter_job, full]):
        assert job.state == original.state
        for tensors, expected in ((job.tensors, original.tensors), (job.optimizer, original.optimizer)):
            assert tensors.keys() == expected.keys()
            for name, value in expected.items():
                assert tensors[name].dtype == value.dtype
                assert torch.equal(tensors[name], value)
    assert loaded.jobs[1].adapter is None
    assert loaded.jobs[0].adapter is not None
    assert loaded.jobs[0].adapter.targets == {Q: (2, 3.0), V: (3, 3.0)}


def test_a_job_in_a_checkpoint_is_an_adapter_peft_reads(tmp_path: Path) -> None:
    config = peft.PeftConfig.from_pretrained(str(save(tmp_path, 5) / "r8"))
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.rank_pattern) == (2, 3, {"v_proj": 3})


def test_no_pickle_is_written(tmp_path: Path) -> None:
    kinds = {path.suffix for path in save(tmp_path, 5).rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_the_oldest_go_and_only_as_many_as_asked(tmp_path: Path) -> None:
    for step in (90, 100, 1_000_000):
        save(tmp_path, step)
    assert len(list_checkpoints(tmp_path)) == 3
    save(tmp_path, 2_000_000, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000", "step-2000000"]
    save(tmp_path, 2_000_000, limit=2)  # the same step again
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000", "step-2000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-2000000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_failed_save_deletes_nothing(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    with pytest.raises(TypeError):
        save(tmp_path, 2, limit=1, unspeakable=object())
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert load_checkpoint(old).step == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "state"])
def test_a_damaged_checkpoint_is_passed_over_and_named(damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "r8" / "optimizer.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "missing":
        file.unlink()
    else:
        (path / "state.json").unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    with pytest.raises(OutputError, match="r8/optimizer.safetensors: " if damage != "state" else "state.json: cannot"):
        load_checkpoint(path)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(OutputError, match="schema 2, this lowrank reads 1"):
        load_checkpoint(path)


SAVERS = """
import os, sys
from pathlib import Path
from tests.checkpoints.test_run_state import latest_checkpoint, load_checkpoint, save
root = Path(sys.argv[1])
def run():
    latest = latest_checkpoint(root)
    step = load_checkpoint(latest).step if latest else 0
    print(os.getpid(), flush=True)
    while True:
        step += 1
        save(root, step, limit=2)
        if step % 3 == 0:
            save(root, step, limit=2)  # replaces a folder that exists
for line in sys.stdin:  # one fresh process per line, without importing torch again
    pid = os.fork()
    if pid == 0:
        run()
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")
def test_killed_at_random_moments_the_latest_is_always_whole(tmp_path: Path) -> None:
    randomness = random.Random(0)
    last, leftovers = 0, 0
    command = [sys.executable, "-c", SAVERS, tmp_path]
    repository = Path(__file__).parents[2]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=repository, text=True) as savers:
        assert savers.stdin is not None
        assert savers.stdout is not None
        for _ in range(40):
            savers.stdin.write("go\n")
            savers.stdin.flush()
            pid = int(savers.stdout.readline())
            time.sleep(randomness.uniform(0.005, 0.08))
            os.kill(pid, signal.SIGKILL)
            assert int(savers.stdout.readline()) == signal.SIGKILL
            leftovers += any(is_leftover(path.name) for path in tmp_path.iterdir())
            recover(tmp_path)
            assert not any(is_leftover(path.name) for path in tmp_path.iterdir())
            last = assert_latest_is_whole(tmp_path, last)
        savers.stdin.close()
    assert last > 10, "it saved between the kills"  # many more on a machine without other work
    assert leftovers > 5, "many kills came during a save"


def assert_latest_is_whole(root: Path, at_least: int) -> int:
    """Its step; everything in it is of that one instant, and nothing that was durable is lost."""
    latest = latest_checkpoint(root)
    if latest is None:
        assert at_least == 0
        return 0
    loaded = load_checkpoint(latest)
    for job in loaded.jobs:
        assert job.state["step"] == loaded.step == loaded.state["tick"]
        assert all((value == loaded.step).all() for value in job.tensors.values())
        assert all((value == loaded.step + 0.5).all() for value in job.optimizer.values())
    assert len(list_checkpoints(root)) <= 3
    assert loaded.step >= at_least
    return loaded.step
