"""What a rank writes and reports: the first owns the run folder, the others write nothing, and a stop request to any
of them reaches all.

In a run of one process, that process is the first rank."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lowrank.checkpoints.run_folder import RunFolder, open_run_folder
from lowrank.config import RunConfig
from lowrank.errors import LowrankError, OutputError
from lowrank.notices import log_notice
from lowrank.ranks import Processes, Ranks
from lowrank.train.checkpointer import Checkpointer
from lowrank.train.distributed_stop_signal import DistributedStopSignal
from lowrank.train.job import Job
from lowrank.train.stop_signal import StopSignal


def stop_signal_of(ranks: Ranks, file: Path) -> StopSignal:
    """Return the stop signal of this rank. `file`: the stop file of the run."""
    return StopSignal(file) if ranks.world == 1 else DistributedStopSignal(file, ranks)


def open_rank_folder(stack: ExitStack, config: RunConfig, ranks: Ranks) -> RunFolder:
    """Open the run's folder; on ranks that do not write, a temporary one, with the checkpoint of the first rank's.
    OutputError as from `open_run_folder`, and where a rank cannot see that checkpoint."""
    names = [job.name for job in config.jobs]
    if ranks.rank == 0:
        folder = stack.enter_context(
            open_run_folder(config.output_dir, jobs=names, resume=config.resume, overwrite=config.overwrite)
        )
        checkpoint = folder.checkpoint
        ranks.exchange(None if checkpoint is None else str(checkpoint.resolve()))
        return folder
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lowrank-rank-")))
    folder = stack.enter_context(open_run_folder(scratch / "run", jobs=names))
    path = ranks.exchange(None)[0]
    if path is None:
        return folder
    if not Path(path).is_dir():
        raise OutputError(
            f"rank {ranks.rank} on {socket.gethostname()} does not see the checkpoint {path}, from which the run is "
            "resumed; put output_dir where all machines see it, or copy the checkpoint there"
        )
    folder.checkpoint = Path(path)
    return folder


class SilentCheckpointer(Checkpointer):
    """The checkpointer of a rank that does not write: it parks and restores jobs, and writes no files."""

    def save_adapter(self, job: Job, which: str) -> Path:
        """Write nothing. The rank only takes part in the gathers that the first one needs of a sharded base (DoRA's
        norms of averaged weights)."""
        with self.engine.eval_weights([job.slot]):
            return self.folder / job.name / which

    def checkpoint(self, iteration: int, jobs: Sequence[Job]) -> Path:
        """Write nothing."""
        return self.folder


def checkpointer_class(ranks: Ranks) -> type[Checkpointer]:
    """Return the class of this rank's checkpointer."""
    return Checkpointer if ranks.rank == 0 else SilentCheckpointer


def rank_notifier(ranks: Ranks, notify: Callable[[str], None]) -> Callable[[str], None]:
    """Return `notify` on the first rank; on others, which have no reporters, a log line with the number of the rank."""
    return notify if ranks.rank == 0 else lambda text: log_notice(f"rank {ranks.rank}: {text}")


def is_reported_by_first(ranks: Ranks, error: LowrankError) -> bool:
    """Return whether the first rank reports the same error, so that this one need not."""
    return isinstance(ranks, Processes) and ranks.reported_by_first(error)
