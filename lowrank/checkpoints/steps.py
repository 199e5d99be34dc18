"""Lists the checkpoints of a run folder, and whether they are whole; without torch, for whoever only looks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowrank.errors import OutputError, raise_all
from lowrank.foreign_files import read_json

SCHEMA = 1
STATE_FILE = "state.json"

_STEP = re.compile(r"step-(\d{6,})")


def list_checkpoints(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first, whole or not."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint of which no file is missing or cut short."""
    for path in reversed(list_checkpoints(root)):
        try:
            read_top(path)
        except OutputError:
            continue
        return path
    return None


def read_top(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. OutputError with every file that is missing or cut short."""
    top = read_json(path / STATE_FILE, OutputError)
    if top.get("schema") != SCHEMA:
        raise OutputError(
            f"{path}: a checkpoint of schema {top.get('schema')!r}, this lowrank reads {SCHEMA}; "
            "resume with the version that wrote it"
        )
    problems = []
    for name, size in top["bytes"].items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name}: missing")
        elif file.stat().st_size != size:
            problems.append(f"{name}: {file.stat().st_size} bytes, expected {size}")
    raise_all(OutputError, f"{path}: this checkpoint is damaged; delete it to resume from the one before", problems)
    return top
