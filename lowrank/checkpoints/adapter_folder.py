"""Finds the folders that hold an adapter, by their files alone; without torch, for whoever only looks."""

from __future__ import annotations

from pathlib import Path

from lowrank.checkpoints.atomic import current

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether an adapter is there; a folder that is being replaced counts."""
    return (current(folder) / CONFIG_FILE).is_file()


def adapter_in(place: Path) -> Path | None:
    """`place`, or its best or last, whichever holds an adapter first."""
    return next((folder for folder in (place, place / "best", place / "last") if is_adapter(folder)), None)


def adapters_in(root: Path) -> dict[str, Path]:
    """Every adapter folder in `root`, by its name."""
    return {path.name: place for path in sorted(root.iterdir()) if (place := adapter_in(path)) is not None}
