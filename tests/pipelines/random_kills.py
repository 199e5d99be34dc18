"""kill -9 at random moments of a run that is started again and again. Moments are states of the run and not times, so a
busy machine kills where an idle one does."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lowrank.checkpoints.atomic import is_leftover
from tests.command_line import Child


def latest_step(out: Path) -> int:
    """Of the checkpoints in a run's folder; 0 before the first."""
    return max((int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").glob("step-*[0-9]")), default=0)


def kill_again_and_again(
    start: Callable[[], Child], out: Path, last: int, step_seconds: float, kills: int, generator: random.Random
) -> tuple[int, int]:
    """How many kills struck, and how many of them during a save. `last`: the step of the run's end. Each life is ended
    about as much further on as the others, and up to two steps later than that: within a step or a save, or while it
    starts."""
    struck = saving = 0
    for kill in range(kills):
        run = start()
        wanted = int((kill + generator.random()) * 0.8 * last / kills)
        while latest_step(out) < wanted and run.poll() is None:
            time.sleep(0.002)
        time.sleep(generator.uniform(0.0, 2.0 * step_seconds))
        run.kill()
        code = run.wait()
        if code == 0:  # it was over in the meantime
            break
        assert code == -signal.SIGKILL, kill
        struck += 1
        saving += any(is_leftover(path.name) for path in out.rglob("*"))
    return struck, saving
