"""How a run is laid out on its ranks: the lanes of a step, and where the base's weights lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from lowrank.config import RunConfig
from lowrank.errors import ConfigError, raise_all
from lowrank.kernels.accelerators import with_index
from lowrank.models.host_blocks import MachineBlocks
from lowrank.models.loading.pretrained import choose_device
from lowrank.models.placement import Placement
from lowrank.models.sharded import Sharded, packs_integers
from lowrank.models.streamed import Streamed
from lowrank.ranks import Ranks, ranks_of_a_machine
from lowrank.report.events import Event, Notice
from lowrank.train.lanes import Lanes, ManyLanes, OneLane


def choose_lanes(
    config: RunConfig, saved: Mapping[str, Any] | None, ranks: Ranks, report: Callable[[Event], None]
) -> Lanes:
    """Return as many lanes as the settings say; for `lanes: auto`, as many as the run began with (`saved`: the
    checkpoint's settings), or as there are ranks, if these are more. ConfigError for a number that is no power of two
    or that the ranks cannot share, and for settings that train in one process only."""
    began = (saved or {}).get("lanes", "auto")
    count = began if config.lanes == "auto" else config.lanes
    count = ranks.world if count == "auto" else int(count)
    if config.lanes == "auto" and count < ranks.world:
        text = (
            f"the run began with {count} lanes and is resumed with {ranks.world}, one for each device: the results are "
            "the same to rounding, not to the bit"
        )
        report(Notice(text, level="warning"))
        count = ranks.world
    problems = []
    if count & (count - 1):
        problems.append(f"lanes: {count} is no power of two; train on 1, 2, 4, 8 ... devices, or set lanes to one")
    elif count % ranks.world:
        way_out = [str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= count]
        problems.append(
            f"devices: {ranks.world} do not divide the {count} lanes in which each step is computed, so that its bits "
            f"are the same on any number of devices; train on {', '.join(way_out)}"
        )
    if count > 1 and any(getattr(job.optimizer, "layerwise", False) for job in config.jobs):
        problems.append(
            "optimizer.layerwise: updates happen within the backward pass, before other devices' gradients are there; "
            "train on one device, or leave layerwise out"
        )
    raise_all(ConfigError, "this run cannot be computed on these devices:", problems)
    return OneLane() if count == 1 else ManyLanes(ranks, count, in_step=config.base.startswith("sharded"))


def choose_placement(config: RunConfig, ranks: Ranks, report: Callable[[Event], None]) -> Placement | None:
    """Return where the base's weights lie; None: all on every device. For a sharded base this begins the process group,
    since every rank keeps its part while the base is read. ConfigError for a shard size that does not divide the ranks,
    and for placements that this machine or torch cannot do."""
    if config.base == "replicated":
        return None
    if config.base == "streamed":
        device = with_index(choose_device(config.model))
        if ranks.world == 1:
            return Streamed(device)
        warn = partial(_warn, report)
        return Streamed(device, MachineBlocks(ranks, pin=device.type == "cuda", warn=warn))
    if ranks.world == 1:
        report(Notice(f"base: {config.base}: there is one device, which holds all of the base", level="warning"))
        return None
    size = ranks_of_a_machine(ranks.world) if config.shard_size == "auto" else config.shard_size
    if ranks.world % size:
        raise ConfigError(f"shard_size: {size} does not divide the {ranks.world} devices of this run")
    if size == 1:
        report(Notice("shard_size: 1: each device holds all of the base", level="warning"))
        return None
    device = with_index(choose_device(config.model))
    offload = config.base == "sharded_offload"
    if offload and device.type == "cpu":
        raise ConfigError("base: sharded_offload: the devices compute in host memory already; set base: sharded")
    if not packs_integers() and config.model.storage.type != "dense":
        raise ConfigError(
            f"base: {config.base} with packed weights needs torch 2.12 or later (this is {torch.__version__}), which "
            "can cut integers"
        )
    ranks.begin(device)
    return Sharded(device, ranks.world, size, offload)


def _warn(report: Callable[[Event], None], text: str) -> None:
    report(Notice(text, level="warning"))
