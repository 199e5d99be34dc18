"""A step that cannot be taken, since a file that a row names is broken or has gone, or a stream breaks off: what a run
goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.errors import DataError
from lowrank.media.medium_files import BadMedium
from lowrank.segments import Segment
from lowrank.train.job import Job


def as_they_are(jobs: Sequence[Job]) -> list[Job]:
    """The jobs for a checkpoint that is written later, whatever steps their dataloaders give until then."""
    return [replace(job, dataloader=_Before(job.dataloader.epoch, job.dataloader.state())) for job in jobs]


def stopped_by(error: BadMedium, checkpoint: str) -> DataError:
    """What is said of a run that ends so; it goes on from `checkpoint`, in words."""
    return DataError(
        f"{error}\n  bring the file back, or put a whole one of the same size in its place, and go on from "
        f"{checkpoint} (resume=true); or leave the row out and begin a new run\n"
        "  data.check_pictures: decode finds files that are broken within before the model loads"
    )


def breaks_off(error: DataError, checkpoint: str) -> DataError:
    """The same of rows that cannot be read on."""
    return DataError(f"{error}\n  mend that, and go on from {checkpoint} (resume=true)")


@dataclass(frozen=True)
class _Before:
    """What a checkpoint keeps of a source of steps."""

    epoch: float
    kept: dict[str, Any]

    def state(self) -> dict[str, Any]:
        return self.kept

    def next_step(self) -> list[Segment]:
        raise AssertionError("the source itself gives steps")

    def load_state(self, state: dict[str, Any]) -> None:
        raise AssertionError("the source itself goes on")
