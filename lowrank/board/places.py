"""Which files the board may touch: its own folder, and folders named when it was started."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowrank.errors import OutputError

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
"""What may be uploaded and picked as data."""
SETTINGS_SUFFIXES = (".yaml", ".yml")
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\:*?\"<>|]{1,120}")


class OutsideError(OutputError):
    """A path that leads out of the folders of the board, or a name that cannot be a file's."""


@dataclass(frozen=True)
class Places:
    """The folders of one board. `models` and `data` are further folders that may be read."""

    folder: Path
    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()

    @property
    def runs(self) -> Path:
        """Where runs lie, a folder each."""
        return self.folder / "runs"

    @property
    def uploads(self) -> Path:
        """Where uploaded data lies. Nothing is ever imported from it."""
        return self.folder / "data"

    @property
    def exports(self) -> Path:
        """Where models that are exported are written."""
        return self.folder / "exports"

    @property
    def own(self) -> Path:
        """What only the board reads and writes."""
        return self.folder / ".board"

    @property
    def tasks(self) -> Path:
        """A folder for each command that was started."""
        return self.own / "tasks"

    def make(self) -> None:
        """Make the folders that are missing. OutputError if that is not possible."""
        try:
            for folder in (self.runs, self.uploads, self.tasks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be the board's folder: {error}") from error

    def run(self, name: str) -> Path:
        """The folder of a run, there or not. OutsideError for what is no name of one."""
        return child_of(self.runs, name)

    def readable_data(self, path: str) -> Path:
        """A file within the folders of data, resolved. OutsideError for any other, also through links."""
        found = confined(path, (self.folder, *self.data))
        if found.suffix.lower() not in DATA_SUFFIXES or self.own in (found, *found.parents):
            raise OutsideError(f"{path!r} is no data file; data files end in {', '.join(DATA_SUFFIXES)}")
        return found

    def readable_model(self, path: str) -> Path:
        """A folder or GGUF file within the folders of models, resolved."""
        return confined(path, (self.folder, *self.models))

    def shown(self, path: Path) -> str:
        """As a command started in the folder would name it: relative where it lies within."""
        try:
            return path.resolve().relative_to(self.folder.resolve()).as_posix()
        except ValueError:
            return str(path)


def child_of(folder: Path, name: str) -> Path:
    """`folder/name`. OutsideError if the name leads elsewhere, begins with a dot, or a link stands there that does."""
    if not _NAME.fullmatch(name) or name.startswith(".") or name != name.strip():
        raise OutsideError(f"{name[:200]!r} cannot be a name here")
    place = folder / name
    if place.resolve().parent != folder.resolve():
        raise OutsideError(f"{name!r} is a link that leads out of {folder.name}")
    return place


def confined(path: str, folders: Sequence[Path]) -> Path:
    """`path` resolved, links followed, if that lies within one of the folders; relative paths are the first's."""
    if "\x00" in path:
        raise OutsideError("a path cannot contain the character 0")
    try:
        found = (folders[0] / os.path.expanduser(path)).resolve()
    except (OSError, RuntimeError) as error:
        raise OutsideError(f"{path[:200]!r} cannot be followed ({error})") from error
    if not any(found.is_relative_to(folder.resolve()) for folder in folders):
        named = ", ".join(str(folder) for folder in folders)
        raise OutsideError(f"{path[:200]!r} lies outside of the folders the board may use ({named})")
    return found


def free_name(folder: Path, wanted: str) -> str:
    """`wanted`, with a number behind it if something of that name is there."""
    stem, suffix = os.path.splitext(wanted) if folder.name == "data" else (wanted, "")
    name, number = wanted, 2
    while (folder / name).exists():
        name, number = f"{stem}-{number}{suffix}", number + 1
    return name


def safe_name(text: str, default: str) -> str:
    """The text as a name of a file or folder: what cannot stand in one becomes `-`."""
    name = re.sub(r"[\x00-\x20\x7f/\\:*?\"<>|]+", "-", text).strip("-. ")[:100]
    return name or default
