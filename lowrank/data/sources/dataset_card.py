"""The card of a dataset: the `configs` at the head of its README.md, which say what its subsets and splits are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lowrank.data.sources.places import shown
from lowrank.errors import DataError

_LARGEST_HEAD = 1 << 20
_MARK = "---"


@dataclass(frozen=True)
class DatasetSubset:
    """One entry of `configs`: a subset. `patterns` are those of each split's files; empty: names decide."""

    name: str
    default: bool
    folder: str | None
    patterns: Mapping[str, tuple[str, ...]]


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias (*name), which is not read here")
        return super().compose_node(parent, index)


def choices_of(folder: Path) -> list[DatasetSubset]:
    """The subsets that the card in `folder` names; none without `configs` in it. DataError if it is broken."""
    path = folder / "README.md"
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            text = file.read(_LARGEST_HEAD)
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    lines = text.split("\n")
    if lines[0].rstrip() != _MARK:
        return []
    end = next((number for number, line in enumerate(lines[1:], start=1) if line.rstrip() == _MARK), None)
    if end is None:
        return []
    try:
        content = yaml.load("\n".join(lines[1:end]), Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{shown(path)}: broken YAML at its head ({reason}); mend it, or name files, not the folder"
        ) from error
    entries = content.get("configs") if isinstance(content, dict) else None
    if entries is None:
        return []
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{shown(path)}: `configs` is no list of subsets; mend it, or name files, not the folder")
    return [_choice(entry, path) for entry in entries]


def _choice(entry: Mapping[str, Any], path: Path) -> DatasetSubset:
    name = str(entry.get("config_name", "default"))
    files = entry.get("data_files")
    if isinstance(files, (str, dict)):
        files = (
            [files]
            if isinstance(files, str) or "path" in files
            else [{"split": k, "path": v} for k, v in files.items()]
        )
    patterns: dict[str, tuple[str, ...]] = {}
    for item in files or []:
        split, value = (item.get("split", "train"), item.get("path")) if isinstance(item, dict) else ("train", item)
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(each, str) for each in paths):
            raise DataError(f"{shown(path)}: configs, {name}: data_files of the split {split!r} are no paths; mend it")
        outside = [each for each in paths if each.startswith("/") or ".." in each.split("/") or "://" in each]
        if outside:
            raise DataError(
                f"{shown(path)}: configs, {name}: {shown(outside[0])} is outside of the folder; name files yourself"
            )
        patterns[str(split)] = (*patterns.get(str(split), ()), *paths)
    folder = entry.get("data_dir")
    default = entry.get("default") is True or name == "default"
    return DatasetSubset(name, default, folder if isinstance(folder, str) else None, patterns)
