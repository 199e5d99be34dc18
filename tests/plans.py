"""Runs in tests are planned once for each kind of run: a memory plan traces steps on fake tensors, which takes longer
than the few steps of a tiny model.

What a plan may refuse is still asked every time; tests/planning and those named below plan every run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lowrank.config import RunConfig
from lowrank.data.prepare import Prepared
from lowrank.models.layer_wrappers import saved_wrapper
from lowrank.pipelines import memory_plan
from lowrank.planning.simulation import read_config

EVERY_TIME = ("tests.planning", "tests.search", "tests.test_model_settings")
"""Test modules, or packages of them, whose runs are all planned."""


def once_for_each_kind() -> Callable[[RunConfig, Sequence[Prepared]], Any]:
    """What stands in for `memory_plan._plan`."""
    plan, known = memory_plan._plan, dict[str, Any]()

    def planned(config: RunConfig, data: Sequence[Prepared]) -> Any:
        kind = _kind(config, data)
        if kind in known:
            memory_plan.planned_jobs(config, data)
            return None, known[kind]
        found = plan(config, data)
        if kind is not None and not isinstance(found, Exception) and found[1].fits:
            known[kind] = found[1]
        return found

    return planned


def _kind(config: RunConfig, data: Sequence[Prepared]) -> str | None:
    """All that may make a plan fail, and nothing of sizes; None for what is planned every time."""
    try:
        base = read_config(config.model)
    except Exception:  # planned, to say so
        return None
    if saved_wrapper(base) is not None or any(getattr(job.adapter, "path", None) for job in config.jobs):
        return None
    sizes = {"rank", "alpha", "dropout"}
    jobs = [
        [
            job.tuning,
            job.adapter.model_dump(mode="json", exclude=sizes),
            job.objective.model_dump(mode="json"),
            job.optimizer.type,
            job.freeze.model_dump(mode="json"),
            job.neftune_noise_alpha,
            bool(own.train.heaviest_step()[0].media),
        ]
        for job, own in zip(config.jobs, data)
    ]
    model = config.model.model_dump(mode="json", exclude={"path"})
    settings = [config.micro_batch_tokens, config.lanes, config.devices, config.base, config.shard_size]
    return json.dumps([Path(config.model.path).name, base.to_dict(), model, settings, jobs], sort_keys=True, default=str)
