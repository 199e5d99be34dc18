"""Finds the folders that hold an adapter, by their files alone; without torch, for whoever only looks."""

from __future__ import annotations

from pathlib import Path

from lowrank.checkpoints.atomic import current
from lowrank.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
JOB_FOLDERS = ("best", "last")
"""What a run writes into a job's folder."""


def check_which(which: str) -> None:
    """ConfigError for another than one of `JOB_FOLDERS`, where it is said which of a job's adapters is meant."""
    if which not in JOB_FOLDERS:
        raise ConfigError(
            f"which: {which!r}; expected 'best' (a job's adapter at its best evaluation) or 'last' (at its end)"
        )


def is_adapter(folder: Path) -> bool:
    """Whether an adapter is there; a folder that is being replaced counts."""
    return (current(folder) / CONFIG_FILE).is_file()


def adapter_in(place: Path) -> Path | None:
    """`place`, or its best or last, whichever holds an adapter first."""
    return next((folder for folder in (place, *(place / name for name in JOB_FOLDERS)) if is_adapter(folder)), None)


def adapters_in(root: Path) -> dict[str, Path]:
    """Every adapter folder in `root`, by its name; or `root` alone, if it is one: a job's best or last by the job's."""
    if is_adapter(root):
        place = root.resolve()
        return {place.parent.name if place.name in JOB_FOLDERS else place.name: root}
    return {path.name: place for path in sorted(root.iterdir()) if (place := adapter_in(path)) is not None}
