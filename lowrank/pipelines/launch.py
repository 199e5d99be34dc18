"""Launching: a run is trained in this process, or in several, one for each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowrank.config import RunConfig
from lowrank.errors import ConfigError
from lowrank.pipelines.assign_jobs import uses_job_parallelism
from lowrank.pipelines.data_parallel import train_as_rank, train_processes
from lowrank.pipelines.shares import config_of_own_share, train_shares, uses_gpus
from lowrank.pipelines.train import train as train_here
from lowrank.ranks import processes_here
from lowrank.report.events import Reporter


def train(
    config: RunConfig, *, reporters: Sequence[Reporter] = (), strict: bool = False, allow_code: bool = False
) -> dict[str, Any]:
    """Run `lowrank.pipelines.train.train` on the devices that the settings name, or as one of the ranks that a launcher
    has started. Returns the contents of summary.json."""
    if config.share is not None:
        config = config_of_own_share(config, reporters, strict=strict)
        return train_here(config, reporters=reporters, strict=strict, allow_code=allow_code)
    if processes_here() > 1:
        return train_as_rank(config, reporters=reporters, strict=strict, allow_code=allow_code)
    number = num_devices(config)
    if number == 1:
        return train_here(config, reporters=reporters, strict=strict, allow_code=allow_code)
    start = train_shares if uses_job_parallelism(config, number) else train_processes
    return start(config, number, reporters=reporters, strict=strict, allow_code=allow_code)


def num_devices(config: RunConfig) -> int:
    """Return the number of processes, by the setting `devices`. ConfigError for more than there are GPUs."""
    there = torch.cuda.device_count() if uses_gpus(config) else None
    if config.devices == "all":
        return there or 1
    if there is not None and config.devices > there:
        raise ConfigError(f"devices: {config.devices}: this machine has {there} usable GPUs")
    return config.devices
