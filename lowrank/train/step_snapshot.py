"""What a run is resumed from where a step cannot be taken: a media file is broken or missing, or a stream fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.errors import DataError
from lowrank.media.medium_files import BadMedium
from lowrank.segments import Segment
from lowrank.train.job import Job


def snapshot(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs as a checkpoint needs them, with their dataloaders' present state, however many steps these give
    before it is written."""
    return [replace(job, dataloader=_DataloaderState(job.dataloader.epoch, job.dataloader.state())) for job in jobs]


def bad_media_error(error: BadMedium, checkpoint: str) -> DataError:
    """Return the error that ends a run at a broken or missing media file. `checkpoint`: a description of the one to
    resume from."""
    return DataError(
        f"{error}\n  restore the file, or another of the same size, then resume from {checkpoint} (resume=true); or "
        "drop the row and start a new run\n"
        "  data.check_pictures: decode finds files that are broken within before the model loads"
    )


def stream_error(error: DataError, checkpoint: str) -> DataError:
    """Return the error that ends a run whose stream cannot be read further."""
    return DataError(f"{error}\n  fix this, then resume from {checkpoint} (resume=true)")


@dataclass(frozen=True)
class _DataloaderState:
    """A dataloader that only has a state, for a checkpoint."""

    epoch: float
    kept: dict[str, Any]

    def state(self) -> dict[str, Any]:
        return self.kept

    def next_step(self) -> list[Segment]:
        raise AssertionError("only the dataloader itself gives steps")

    def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("only the dataloader itself is restored")
