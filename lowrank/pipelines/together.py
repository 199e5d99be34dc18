"""A run of several ranks: what is decided once and told to all, what must be alike, and what only the first one writes.

Of one process all of this is nothing: it agrees with itself, and writes.
"""

from __future__ import annotations

import dataclasses
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import date
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.checkpoints.live_commands import CommandQueue, LiveCommand
from lowrank.checkpoints.run_folder import RunFolder, open_run_folder
from lowrank.checkpoints.settings_changes import flattened
from lowrank.config import RunConfig
from lowrank.data.batching.dataloader import DataLoader
from lowrank.data.prepare import Prepared
from lowrank.errors import ConfigError, LowrankError, ModelError, OutputError, raise_all
from lowrank.kernels.accelerators import with_index
from lowrank.models.host_blocks import MachineBlocks
from lowrank.models.loading.pretrained import choose_device, choose_dtype
from lowrank.models.placement import Placement
from lowrank.models.sharded import Sharded, packs_integers
from lowrank.models.streamed import Streamed
from lowrank.notices import log_notice
from lowrank.pipelines.job_data import with_date
from lowrank.pipelines.memory_plan import with_slots
from lowrank.planning.plan import MemoryPlan
from lowrank.ranks import Processes, Ranks, agree, ranks_of_a_machine
from lowrank.report.events import Event, Notice
from lowrank.report.summary import versions
from lowrank.segments import Segment
from lowrank.train.checkpointer import Checkpointer
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.lanes import Lanes, ManyLanes, OneLane
from lowrank.train.stopping import Stopping
from lowrank.train.stopping_together import StoppingTogether

COMPARED_EVERY = 100
"""Steps between two looks whether all ranks still train the same adapters."""
_OF_ONE_MACHINE = ("output_dir", "model.path", "model.device", "resume", "overwrite", "report_to", "devices", "data.")
"""Settings that may differ between ranks: where things lie. What the data hold is compared itself."""


def stopping_of(ranks: Ranks, file: Path) -> Stopping:
    """What listens for a request to stop."""
    return Stopping(file) if ranks.world == 1 else StoppingTogether(file, ranks)


def folder_of(stack: ExitStack, config: RunConfig, ranks: Ranks) -> RunFolder:
    """The run's folder; on ranks that do not write, a scratch one, with the checkpoint of the first. OutputError as
    from `open_run_folder`, and where a rank cannot see that checkpoint."""
    names = [job.name for job in config.jobs]
    if ranks.rank == 0:
        folder = stack.enter_context(
            open_run_folder(config.output_dir, jobs=names, resume=config.resume, overwrite=config.overwrite)
        )
        place = folder.checkpoint
        ranks.exchange(None if place is None else str(place.resolve()))
        return folder
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-rank-")))
    folder = stack.enter_context(open_run_folder(scratch / "run", jobs=names))
    given = ranks.exchange(None)[0]
    if given is None:
        return folder
    if not Path(given).is_dir():
        raise OutputError(
            f"rank {ranks.rank} on {socket.gethostname()} does not see the checkpoint {given}, from which the run goes "
            "on; put output_dir where all machines see it, or copy the checkpoint there"
        )
    folder.checkpoint = Path(given)
    return folder


def dated(config: RunConfig, settings: dict[str, Any] | None, ranks: Ranks) -> RunConfig:
    """`with_date`, by the clock of the first rank."""
    today = date.fromisoformat(agree(ranks, lambda: date.today().isoformat()))
    return with_date(config, settings, today)


def planned(
    config: RunConfig,
    data: Sequence[Prepared],
    before: Mapping[str, Any] | None,
    report: Callable[[Event], None],
    capacity: int | None,
    lanes: Lanes,
) -> tuple[RunConfig, MemoryPlan | None]:
    """`with_slots` by the memory of the first rank: how a step is cut is a matter for all of them alike."""
    ranks, count = lanes.ranks, lanes.count
    if ranks.world == 1:
        return with_slots(config, data, before, report, capacity)
    plan: MemoryPlan | None = None

    def decide() -> list[Any]:
        nonlocal plan
        lanes = config.model_copy(update={"lanes": count})
        decided, plan = with_slots(lanes, data, before, report, capacity)
        return [decided.micro_batch_tokens, decided.model.activation_checkpointing, decided.max_concurrent_jobs]

    tokens, recompute, at_once = agree(ranks, decide)
    model = config.model.model_copy(update={"activation_checkpointing": recompute})
    changes = {"micro_batch_tokens": tokens, "model": model, "max_concurrent_jobs": at_once}
    return config.model_copy(update=changes), plan


def lanes_of(
    config: RunConfig, before: Mapping[str, Any] | None, ranks: Ranks, report: Callable[[Event], None]
) -> Lanes:
    """As many as the settings say; left out, as the run began with, or as there are ranks, where these are more.
    ConfigError for numbers that do not go together, and for what trains in one process only."""
    began = (before or {}).get("lanes", "auto")
    count = began if config.lanes == "auto" else config.lanes
    count = ranks.world if count == "auto" else int(count)
    if config.lanes == "auto" and count < ranks.world:
        text = f"the run began with {count} lanes and goes on with {ranks.world}, one for each device: the results are "
        report(Notice(text + "the same to rounding, not to the bit", level="warning"))
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


def placement_of(config: RunConfig, ranks: Ranks, report: Callable[[Event], None]) -> Placement | None:
    """Where the base's weights are to lie; None: all on every device. With it begins the process group, since every
    rank keeps its part while the base is read. ConfigError for numbers that do not go together."""
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


def refuse_unlike(
    config: RunConfig, data: Sequence[Prepared], ranks: Ranks, warn: Callable[[str], None] = log_notice
) -> None:
    """ConfigError that names every difference in settings, data, device and versions between a rank and the first. GPUs
    of two kinds are a warning: each step is right on them, and its bits depend on who computes what."""
    if ranks.world == 1:
        return
    known, device = versions(), choose_device(config.model)
    own = {
        "host": socket.gethostname(),
        "settings": {
            name: value
            for name, value in flattened(config.model_dump(mode="json")).items()
            if not name.startswith(_OF_ONE_MACHINE)
        }
        | {"jobs": _without_places(config)},
        "data": {job.name: digest_of_data(prepared) for job, prepared in zip(config.jobs, data)},
        "versions": {name: known[name] for name in ("lowrank", "torch", "transformers")},
        "devices": {"model.device": device.type, "model.dtype": str(choose_dtype(config.model, device))},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    first, *others = ranks.exchange(own)
    problems = []
    for rank, other in enumerate(others, start=1):
        who = f"rank {rank} on {other['host']}"
        if first["gpu"] and other["gpu"] and first["gpu"] != other["gpu"]:
            text = f"{who} computes on {other['gpu']}, rank 0 on {first['gpu']}: a step takes as long as on the slower"
            warn(f"{text}, and the same bits come again only on the same devices in the same order")
        for part in ("versions", "devices", "settings", "data"):
            names = [name for name in {**first[part], **other[part]} if first[part].get(name) != other[part].get(name)]
            for name in names:
                if part == "data":
                    problems.append(f"{who}: the training data of job {name} are others than those of rank 0")
                else:
                    values = f"{_shown(other[part].get(name))}, on rank 0 {_shown(first[part].get(name))}"
                    problems.append(f"{who}: {name} is {values}")
    raise_all(ConfigError, "the processes of this run are not alike, so they would train different things:", problems)


def _without_places(config: RunConfig) -> list[dict[str, Any]]:
    """The jobs' settings without those that say where something lies."""
    jobs = [flattened(job.model_dump(mode="json", exclude={"data"})) for job in config.jobs]
    return [{name: value for name, value in job.items() if not name.endswith(("path", "model"))} for job in jobs]


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def digest_of_data(prepared: Prepared) -> str:
    """The same for the same tokens, weights and pictures in the same order; of a stream, of the rows that are known."""
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


class SilentCheckpointer(Checkpointer):
    """Of a rank that does not write: it parks and restores jobs as the first does, and leaves files to that one."""

    def save_adapter(self, job: Job, which: str) -> Path:
        """No file. What the first rank reads of a base in parts, all gather: DoRA's norms of averaged weights."""
        with self.engine.settled([job.slot]):
            return self.folder / job.name / which

    def checkpoint(self, tick: int, jobs: Sequence[Job]) -> Path:
        """Nothing."""
        return self.folder


def checkpointer_of(ranks: Ranks) -> type[Checkpointer]:
    """Who writes, or does not."""
    return Checkpointer if ranks.rank == 0 else SilentCheckpointer


def compare_adapters(engine: Engine, tick: int) -> None:
    """ModelError where ranks train different numbers: what they computed must have been the same to the bit."""
    ranks = engine.lanes.ranks
    own = {str(slot): _digest_of_parameters(job.parameters) for slot, job in engine.jobs.items()}
    first, *others = ranks.exchange([socket.gethostname(), own])
    problems = [
        f"rank {rank} on {other[0]} differs from rank 0 on {first[0]} in the adapter of slot {slot}"
        for rank, other in enumerate(others, start=1)
        for slot in first[1]
        if first[1][slot] != other[1].get(slot)
    ]
    heading = (
        f"after step {tick} the processes of this run do not have the same adapters. They compute the same from the "
        "same numbers, so a device, a driver or a library differs; go on from a checkpoint before (resume: true) on "
        "machines that are alike:"
    )
    raise_all(ModelError, heading, problems)


def _digest_of_parameters(parameters: Mapping[str, torch.nn.Parameter]) -> str:
    digest = blake2b(digest_size=16)
    for name, parameter in parameters.items():
        flat = parameter.detach().reshape(-1).cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Watch:
    """Compares the ranks' adapters before the first step of this process, and now and then."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._begun = engine, False

    def look(self, tick: int) -> None:
        """Before step `tick` + 1."""
        if self._engine.lanes.ranks.world > 1 and (tick % COMPARED_EVERY == 0 or not self._begun):
            compare_adapters(self._engine, tick)
        self._begun = True


def commands_of(command_queue: CommandQueue, ranks: Ranks) -> Callable[[int], list[LiveCommand]]:
    """The commands of the run's folder, which the first rank reads, for all of them."""

    def due(tick: int) -> list[LiveCommand]:
        received = agree(ranks, lambda: [dataclasses.asdict(command) for command in command_queue.due(tick)])
        return [LiveCommand(**command) for command in received]

    return due


def on_first_rank(ranks: Ranks, notify: Callable[[str], None]) -> Callable[[str], None]:
    """`notify`, or on ranks that say nothing else, a line that says who speaks."""
    return notify if ranks.rank == 0 else lambda text: log_notice(f"rank {ranks.rank}: {text}")


def reported_once(ranks: Ranks, error: LowrankError) -> bool:
    """Whether the first rank says this error too."""
    return isinstance(ranks, Processes) and ranks.reported_by_first(error)
