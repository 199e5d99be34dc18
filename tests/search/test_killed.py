"""A sweep that is killed with kill -9 at random moments, again and again: it ends with the same table and bits."""

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
from tests.pipelines.live_runs import make_world, settings, weights
from tests.pipelines.random_kills import kill_again_and_again, latest_step

GRID = {"adapter.rank": [2, 4, 8], "optimizer.learning_rate": [1e-3, 1e-2]}
KILLS = 6


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("search", ["asha", "successive_halving"])
def test_killed_at_random_moments(tmp_path: Path, search: str) -> None:
    """Fewer slots than candidates, a save at every step: `pytest -m slow tests/search/test_killed.py`."""
    world = make_world(tmp_path)
    sweep = {"grid": GRID, "search": search, "reduction_factor": 2, "first_rung": 0.25}
    given: dict[str, Any] = settings(
        world, tmp_path / "whole", sweep=sweep, max_steps=16, save_steps=1, max_concurrent_jobs=2
    )
    del given["jobs"]

    def start() -> Child:
        file = tmp_path / "run.json"
        file.write_text(json.dumps(given))
        return command_line.start(["train", str(file)], out=tmp_path / "out.txt", err=tmp_path / "errors.txt")

    started = time.perf_counter()
    assert start().wait() == 0
    last = latest_step(tmp_path / "whole")
    seconds = (time.perf_counter() - started) / last
    given |= {"output_dir": str(tmp_path / "cut"), "resume": True}
    struck, _ = kill_again_and_again(start, tmp_path / "cut", last, seconds, KILLS, random.Random(search))
    assert struck >= 2, "it was over before it was killed"
    assert start().wait() == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert json.loads((cut / "sweep.json").read_text()) == json.loads((whole / "sweep.json").read_text())
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
