"""Runs in tests are planned once for each kind of job: a memory plan traces steps on fake tensors, which takes longer
than the few steps of a tiny model.

What a plan may refuse is still asked every time, and the modules named below plan every run. Plans lie in a folder
that pytest's workers and the processes they fork share. What plans is imported where it is used: pytest's first
process, which only hands out tests, reads this file too, and its workers wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lowrank.checkpoints.atomic import write_text

if TYPE_CHECKING:
    from lowrank.config import JobConfig, RunConfig
    from lowrank.data.prepare import Prepared

EVERY_TIME = ("tests.planning", "tests.search", "tests.test_model_settings")
"""Test modules, or packages of them, whose runs are all planned."""
PLANS = "LOWRANK_TESTS_PLANS"
"""The environment variable that names the folder of plans."""


def once_for_each_kind(folder: str | Path) -> Callable[[RunConfig, Sequence[Prepared]], Any]:
    """What stands in for `memory_plan._plan`."""
    from lowrank.pipelines import memory_plan
    from lowrank.planning.memory import PlannedMedia, StepBytes
    from lowrank.planning.plan import MemoryPlan

    plan = memory_plan._plan

    def planned(config: RunConfig, data: Sequence[Prepared]) -> Any:
        kinds = _kinds(config, data)
        if kinds is None:
            return plan(config, data)
        files = [Path(folder, hashlib.sha256(kind.encode()).hexdigest() + ".json") for kind in kinds]
        if all(file.exists() for file in files):
            memory_plan.planned_jobs(config, data)
            saved = json.loads(files[0].read_text())
            step, pictures = saved.pop("step"), saved.pop("pictures", None)
            return None, MemoryPlan(StepBytes(**step), pictures=PlannedMedia(**pictures) if pictures else None, **saved)
        found = plan(config, data)
        if not isinstance(found, Exception) and found[1].fits:
            saved = {key: value for key, value in found[1].as_dict().items() if key not in ("peak", "fits")}
            for file in files:
                write_text(file, json.dumps(saved))
        return found

    return planned


def _kinds(config: RunConfig, data: Sequence[Prepared]) -> list[str] | None:
    """Of each job, all that may make a plan of it fail, and nothing of sizes; None for what is planned every time."""
    from lowrank.models.layer_wrappers import saved_wrapper
    from lowrank.planning.simulation import read_config

    try:
        base = read_config(config.model)
    except Exception:  # planned, to say so
        return None
    if saved_wrapper(base) is not None or any(getattr(job.adapter, "path", None) for job in config.jobs):
        return None
    model = config.model.model_dump(mode="json", exclude={"path"})
    settings = [config.micro_batch_tokens, config.lanes, config.devices, config.base, config.shard_size]
    given = [Path(config.model.path).name, base.to_dict(), model, settings]
    return [json.dumps([*given, _kind(job, own)], sort_keys=True, default=str) for job, own in zip(config.jobs, data)]


def _kind(job: JobConfig, own: Prepared) -> list[Any]:
    return [
        job.tuning,
        _without_numbers(job.adapter.model_dump(mode="json")),
        _without_numbers(job.objective.model_dump(mode="json", exclude={"reward_funcs", "system_prompt"})),
        job.optimizer.type,
        job.freeze.model_dump(mode="json"),
        job.neftune_noise_alpha is None,
        any(segment.media for segment in own.train.heaviest_step()),
    ]


def _without_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in settings.items() if isinstance(value, bool) or not isinstance(value, (int, float))
    }


@pytest.fixture(scope="session")
def _plan_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all workers, and for the processes they fork (tests/command_line.py)."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "plans"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLANS, str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def _plans(request: pytest.FixtureRequest, _plan_folder: Path) -> Iterator[None]:
    """Runs of jobs of one kind share a memory plan."""
    from lowrank.pipelines import memory_plan

    with pytest.MonkeyPatch.context() as patch:
        if not request.module.__name__.startswith(EVERY_TIME):
            patch.setattr(memory_plan, "_plan", once_for_each_kind(_plan_folder))
        yield
