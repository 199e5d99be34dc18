"""What the ranks of a run agree on: what one decides for all, and what must be equal on all of them.

One process agrees with itself: each function then returns its own values and exchanges nothing.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from hashlib import blake2b
from typing import Any

import numpy as np
import torch

from lowrank.checkpoints.live_commands import CommandQueue, LiveCommand
from lowrank.checkpoints.settings_changes import flattened
from lowrank.config import RunConfig
from lowrank.data.batching.dataloader import DataLoader
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, raise_all
from lowrank.models.loading.pretrained import choose_device, choose_dtype
from lowrank.notices import log_notice
from lowrank.pipelines.job_data import with_date
from lowrank.pipelines.memory_plan import with_slots
from lowrank.planning.plan import MemoryPlan
from lowrank.ranks import Ranks, agree
from lowrank.report.events import Event
from lowrank.report.summary import versions
from lowrank.segments import Segment
from lowrank.train.lanes import Lanes

_OF_ONE_MACHINE = ("output_dir", "model.path", "model.device", "resume", "overwrite", "report_to", "devices", "data.")
"""Settings that may differ between ranks: where things lie. What the data hold is compared itself."""


def with_agreed_date(config: RunConfig, settings: dict[str, Any] | None, ranks: Ranks) -> RunConfig:
    """Return `with_date` by the clock of the first rank."""
    today = date.fromisoformat(agree(ranks, lambda: date.today().isoformat()))
    return with_date(config, settings, today)


def with_agreed_plan(
    config: RunConfig,
    data: Sequence[Prepared],
    saved: Mapping[str, Any] | None,
    report: Callable[[Event], None],
    capacity: int | None,
    lanes: Lanes,
) -> tuple[RunConfig, MemoryPlan | None]:
    """Return `with_slots` by the memory of the first rank, since all must cut a step alike. On other ranks the plan is
    None."""
    ranks, count = lanes.ranks, lanes.count
    if ranks.world == 1:
        return with_slots(config, data, saved, report, capacity)
    plan: MemoryPlan | None = None

    def decide() -> list[Any]:
        nonlocal plan
        with_lanes = config.model_copy(update={"lanes": count})
        decided, plan = with_slots(with_lanes, data, saved, report, capacity)
        return [decided.micro_batch_tokens, decided.model.activation_checkpointing, decided.max_concurrent_jobs]

    tokens, activation_checkpointing, max_concurrent_jobs = agree(ranks, decide)
    model = config.model.model_copy(update={"activation_checkpointing": activation_checkpointing})
    changes = {"micro_batch_tokens": tokens, "model": model, "max_concurrent_jobs": max_concurrent_jobs}
    return config.model_copy(update=changes), plan


def refuse_rank_differences(
    config: RunConfig, data: Sequence[Prepared], ranks: Ranks, warn: Callable[[str], None] = log_notice
) -> None:
    """Compare the ranks' settings, data, devices and versions. ConfigError that names every difference from the first
    rank. GPUs of two models are a warning: steps are right on them, but their bits depend on which rank computes
    what."""
    if ranks.world == 1:
        return
    known, device = versions(), choose_device(config.model)
    facts = {
        "host": socket.gethostname(),
        "settings": {
            name: value
            for name, value in flattened(config.model_dump(mode="json")).items()
            if not name.startswith(_OF_ONE_MACHINE)
        }
        | {"jobs": _job_settings(config)},
        "data": {job.name: data_digest(prepared) for job, prepared in zip(config.jobs, data)},
        "versions": {name: known[name] for name in ("lowrank", "torch", "transformers")},
        "devices": {"model.device": device.type, "model.dtype": str(choose_dtype(config.model, device))},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    first, *others = ranks.exchange(facts)
    problems = []
    for rank, other in enumerate(others, start=1):
        who = f"rank {rank} on {other['host']}"
        if first["gpu"] and other["gpu"] and first["gpu"] != other["gpu"]:
            warn(
                f"{who} computes on {other['gpu']}, rank 0 on {first['gpu']}: the devices differ, so steps run at the "
                "slower one's speed, and results are not bit-reproducible on another mix of devices"
            )
        for part in ("versions", "devices", "settings", "data"):
            names = [name for name in {**first[part], **other[part]} if first[part].get(name) != other[part].get(name)]
            for name in names:
                if part == "data":
                    problems.append(f"{who}: the training data of job {name} differ from those of rank 0")
                else:
                    values = f"{_shown(other[part].get(name))}, on rank 0 {_shown(first[part].get(name))}"
                    problems.append(f"{who}: {name} is {values}")
    raise_all(ConfigError, "the ranks of this run disagree on:", problems)


def _job_settings(config: RunConfig) -> list[dict[str, Any]]:
    """The jobs' settings without paths, which may differ between machines."""
    jobs = [flattened(job.model_dump(mode="json", exclude={"data"})) for job in config.jobs]
    return [{name: value for name, value in job.items() if not name.endswith(("path", "model"))} for job in jobs]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def data_digest(prepared: Prepared) -> str:
    """Return a digest of a job's tokens, weights and media in their order; of a stream, of the rows read so far."""
    digest = blake2b(digest_size=16)
    samples = prepared.train.samples if isinstance(prepared.train, DataLoader) else ()
    digest.update(str(prepared.train.tokens_of_steps()).encode())
    rows: list[Sequence[Segment]] = [*samples, prepared.eval, prepared.train.heaviest_step()]
    for row in rows:
        for segment in row:
            digest.update(np.ascontiguousarray(segment.token_L, np.int64).tobytes())
            digest.update(np.ascontiguousarray(segment.weight_L, np.float32).tobytes())
            if segment.media is not None:  # equal placeholders may stand for different pictures
                shown = [picture.digest for picture in segment.media.items]
                digest.update(repr((shown, segment.media.spans, segment.media.before)).encode())
    return digest.hexdigest()


def commands_of_first_rank(command_queue: CommandQueue, ranks: Ranks) -> Callable[[int], list[LiveCommand]]:
    """Return a function that gives every rank the live commands which the first one reads in the run folder."""

    def due(iteration: int) -> list[LiveCommand]:
        received = agree(ranks, lambda: [dataclasses.asdict(command) for command in command_queue.due(iteration)])
        return [LiveCommand(**command) for command in received]

    return due
