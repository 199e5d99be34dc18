"""Data parallelism: one run trained by several processes (ranks), among which every optimizer step is divided
(train/lanes.py).

They are started here by `devices=n`, by torchrun, or by a launcher that makes a process group (Ray Train); each calls
`train_as_rank`.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.run_folder import STOP
from lowrank.config import RunConfig
from lowrank.config.code import refuse_code
from lowrank.errors import LowrankError
from lowrank.pipelines.processes import Child, follow, train_arguments
from lowrank.pipelines.rank_output import is_reported_by_first
from lowrank.pipelines.shares import device_environment, refuse_rows_in_memory, uses_gpus
from lowrank.pipelines.train import train
from lowrank.ranks import Processes, RankLost
from lowrank.report.events import Event, Notice, Reporter, RunFinished, RunStarted
from lowrank.third_party import code_allowed
from lowrank.train.listeners import Listeners
from lowrank.train.stop_signal import StopSignal


class ProcessesFailed(LowrankError):
    """A process of a data-parallel run has failed, and with it the run. `exit_code`: that of the first that failed."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def train_as_rank(
    config: RunConfig, *, reporters: Sequence[Reporter] = (), strict: bool = False, allow_code: bool = False
) -> dict[str, Any]:
    """Train as the rank that the environment, or an existing process group, says. An error that all ranks find is
    raised by the first one; the others end by SystemExit with the same exit code."""
    if uses_gpus(config):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    ranks = Processes()
    try:
        return train(config, reporters=reporters, strict=strict, allow_code=allow_code, ranks=ranks)
    except LowrankError as error:
        if not isinstance(error, RankLost) and is_reported_by_first(ranks, error):
            raise SystemExit(error.exit_code) from None
        raise
    finally:
        ranks.end()


def train_processes(
    config: RunConfig,
    number: int,
    *,
    reporters: Sequence[Reporter] = (),
    strict: bool = False,
    allow_code: bool = False,
) -> dict[str, Any]:
    """Start `number` ranks on this machine, each with its own device, and wait for them. Returns the contents of
    summary.json. ProcessesFailed if one has failed; then all are killed."""
    refuse_rows_in_memory(config)
    report = Listeners([], reporters)
    stop_signal = StopSignal(Path(config.output_dir) / STOP)
    with code_allowed(allow_code), tempfile.TemporaryDirectory(prefix="lowrank-ranks-") as folder:
        refuse_code(config, "the settings")
        file = Path(folder) / "run.json"
        settings = config.model_copy(update={"devices": 1}).model_dump(mode="json")
        file.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        port = _free_port()
        children = [
            Child(
                f"rank {rank}",
                train_arguments(file, strict),
                config.output_dir,
                Path(folder) / f"rank-{rank}.log",
                {
                    **device_environment(config, rank, number),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(number),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(number)
        ]

        def on_event(child: Child, event: Event) -> None:
            if isinstance(event, RunStarted):
                event = RunStarted(event.output_dir, event.jobs, settings, event.device, event.dtype)
            report(event)

        failed = follow(children, on_event, stop_signal, lambda text: report(Notice(text, "warning")), all_or_none=True)
        for child in children[1:]:  # the first rank has reported its own notices
            for line in child.output_lines():
                report(Notice(line, "warning"))
        if failed is not None:
            failed = _with_error(failed, children)
            tail_of = failed.stderr_tail()
            text = tail_of if failed is children[0] and failed.error else f"{failed.name}: {tail_of}"
            raise ProcessesFailed(text, failed.code if failed.code is not None and failed.code > 0 else 1)
    summary = children[0].summary
    if summary is None:
        raise KeyboardInterrupt
    report(RunFinished(summary, bool(summary["interrupted"])))
    return summary


def _with_error(failed: Child, children: Sequence[Child]) -> Child:
    """Return the child whose error is reported: where all ranks found the same error, only the first one reports it,
    and it may be the last to end."""
    ended_by_itself = failed.code is not None and failed.code >= 0
    silent = ended_by_itself and not failed.error and not failed.output_lines()
    return children[0] if silent and children[0].error else failed


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
