"""Runs on a base in host memory: the bits of the same run with the base on the device, also where they answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.config import RunConfig
from lowrank.pipelines.launch import train
from lowrank.pipelines.train import train as train_here
from tests.pipelines.live_runs import make_world
from tests.pipelines.sharded_runs import align
from tests.pipelines.test_sharded import same, sharded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = make_world(tmp_path_factory.mktemp("world"))
    align(world / "model" / "model.safetensors")
    return world


def test_a_run_that_answers(world: Path, tmp_path: Path) -> None:
    """LoRA and DoRA, held-out questions answered through the cache of keys and values."""
    given = {"eval_metric": "exact_match", "eval_max_new_tokens": 4, "eval_steps": 2}
    train_here(RunConfig(**sharded(world, tmp_path / "streamed", base="streamed", **given)))
    train_here(RunConfig(**sharded(world, tmp_path / "whole", **given)))
    same(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_and_one_that_goes_on(world: Path, tmp_path: Path) -> None:
    given = {"lanes": 2, "schedule": {"type": "constant"}, "save_steps": 3, "storage": "dense"}
    train(RunConfig(**sharded(world, tmp_path / "two", base="streamed", devices=2, **given)))
    train_here(RunConfig(**sharded(world, tmp_path / "one", **given)))
    same(tmp_path / "two", tmp_path / "one")
    for out, base in (("two", "streamed"), ("one", "replicated")):
        train_here(RunConfig(**sharded(world, tmp_path / out, base=base, resume=True, max_steps=5, **given)))
    same(tmp_path / "two", tmp_path / "one")
