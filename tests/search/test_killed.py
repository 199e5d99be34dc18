"""A sweep that is killed with kill -9 at random moments, again and again: it ends with the same table and bits."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pipelines.live_runs import make_world, settings, weights
from tests.pipelines.test_killed import forking

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
    with forking() as runs:
        runs.start(given)
        started = time.perf_counter()
        while not any((tmp_path / "whole" / "checkpoints").glob("*")):
            time.sleep(0.01)
        starting = time.perf_counter() - started
        assert runs.ended() == 0
        training = time.perf_counter() - started - starting
        given |= {"output_dir": str(tmp_path / "cut"), "resume": True}
        generator, struck = random.Random(search), 0
        for kill in range(KILLS):
            process = runs.start(given)
            code = runs.ended(within=starting + generator.uniform(0.2, 1.0) * training / (KILLS - kill))
            if code is None:
                os.kill(process, signal.SIGKILL)
                assert runs.ended() == signal.SIGKILL
                struck += 1
            else:
                assert code == 0
                break
        assert struck >= 2, "it was over before it was killed"
        runs.start(given)
        assert runs.ended() == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert json.loads((cut / "sweep.json").read_text()) == json.loads((whole / "sweep.json").read_text())
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
