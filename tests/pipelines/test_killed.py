"""kill -9 at random moments, also in the middle of a save: what is resumed ends at the same bits."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from lowrank.checkpoints.atomic import is_leftover
from tests.pipelines.test_train import settings, weights, world  # noqa: F401  (the fixture)

FORKS = """
import json, os, sys
import datasets, transformers.models.llama.modeling_llama  # what a run would import, so that children start at once
from lowrank.config import RunConfig
from lowrank.pipelines.train import train

for line in sys.stdin:
    child = os.fork()
    if not child:
        train(RunConfig(**json.loads(line)), reporters=[])
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""Runs a line's configuration in a process of its own, whose number and exit status it prints."""


class Runs:
    """Starts runs in processes that can be killed."""

    def __init__(self, orders: IO[str], replies: IO[str]) -> None:
        self._orders, self._replies = orders, replies

    def start(self, given: dict[str, Any]) -> int:
        """The process' number."""
        self._orders.write(json.dumps(given) + "\n")
        self._orders.flush()
        return int(self._replies.readline())

    def ended(self, within: float | None = None) -> int | None:
        """The exit status of the one that runs; None if it still runs after so many seconds."""
        if within is not None and not select.select([self._replies], [], [], within)[0]:
            return None
        return int(self._replies.readline())


@contextmanager
def forking() -> Iterator[Runs]:
    """A process that has imported all a run needs, and forks one per run."""
    own = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Runs(process.stdin, process.stdout)
        finally:
            process.stdin.close()


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(world: Path, tmp_path: Path, kills: int) -> None:  # noqa: F811
    """A save at every step, so that many strike during one."""
    given = settings(world, tmp_path / "whole", save_steps=1, num_train_epochs=4 * kills)
    with forking() as runs:
        runs.start(given)
        started = time.perf_counter()
        while not any((tmp_path / "whole/checkpoints").glob("*")):
            time.sleep(0.01)
        starting = time.perf_counter() - started
        assert runs.ended() == 0
        training = time.perf_counter() - started - starting

        given["output_dir"], given["resume"] = str(tmp_path / "cut"), True
        generator, during_a_save = random.Random(0), 0
        for kill in range(kills):
            child = runs.start(given)
            # In all, less than the run takes: what it cannot finish between two kills it must have kept.
            soon = generator.uniform(0.8, 1.0) * starting + generator.uniform(0, 1.5 * training / kills)
            assert runs.ended(within=soon) is None, f"the run ended after {kill} kills: it is too short for this test"
            os.kill(child, signal.SIGKILL)
            assert runs.ended() == signal.SIGKILL
            during_a_save += _was_saving(tmp_path / "cut")
        runs.start(given)
        assert runs.ended() == 0
    assert kills < 10 or during_a_save, "no kill struck during a save"
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert _steps(tmp_path / "whole") == _steps(tmp_path / "cut")
    print(f"{kills} kills, {during_a_save} during a save; {starting:.1f} s to start, {training:.1f} s of training")


def _was_saving(out: Path) -> bool:
    return any(is_leftover(path.name) for path in out.rglob("*"))


def _steps(out: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says, but for the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Notices differ: only a run that was killed has leftovers to remove.
    reported = [line for line in lines if line.get("event") != "notice"]
    return [(line.get("job"), line.get("step"), line.get("loss")) for line in reported]
