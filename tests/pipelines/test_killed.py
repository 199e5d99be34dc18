"""kill -9 at random moments, also in the middle of a save: what is resumed ends at the same bits."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import command_line
from tests.command_line import Child
from tests.pipelines.random_kills import kill_again_and_again, latest_step
from tests.pipelines.test_train import settings, weights, world  # noqa: F401  (the fixture)


@pytest.mark.parametrize("kills", [2, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_random_moments(world: Path, tmp_path: Path, kills: int) -> None:  # noqa: F811
    """A save at every step, so that many strike during one."""
    given = settings(world, tmp_path / "whole", save_steps=1, num_train_epochs=4 * kills + 2)

    def start() -> Child:
        file = tmp_path / "run.json"
        file.write_text(json.dumps(given))
        return command_line.start(["train", str(file)], out=tmp_path / "out.txt", err=tmp_path / "errors.txt")

    command_line.lowrank("--version")  # what it imports once is no part of a run's time
    started = time.perf_counter()
    run = start()
    while not any((tmp_path / "whole/checkpoints").glob("*")):
        time.sleep(0.01)
    starting = time.perf_counter() - started
    assert run.wait() == 0
    training = time.perf_counter() - started - starting

    last = latest_step(tmp_path / "whole")
    given["output_dir"], given["resume"] = str(tmp_path / "cut"), True
    cut = tmp_path / "cut"
    struck, during_a_save = kill_again_and_again(start, cut, last, training / last, kills, random.Random(0))
    assert struck >= min(2, kills), "it was over before it was killed"
    assert start().wait() == 0
    assert kills < 10 or during_a_save, "no kill struck during a save"
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert _steps(tmp_path / "whole") == _steps(tmp_path / "cut")
    print(f"{struck} kills, {during_a_save} during a save; {starting:.1f} s to start, {training:.1f} s of training")


def _steps(out: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says, but for the times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Notices differ: only a run that was killed has leftovers to remove.
    reported = [line for line in lines if line.get("event") != "notice"]
    return [(line.get("job"), line.get("step"), line.get("loss")) for line in reported]
