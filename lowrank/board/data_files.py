"""Data within the folders of the board: the list, and what a person uploads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lowrank.board.places import DATA_SUFFIXES, Places

_DEEPEST = 3
_MOST = 300
_NOT_DATA = frozenset(
    {
        "config.json", "summary.json", "metrics.jsonl", "data_report.json", "export.json", "dataset_info.json",
        "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "generation_config.json",
        "special_tokens_map.json", "vocab.json", "merges.txt", "metrics.json", "demo.json",
        "model.safetensors.index.json", "added_tokens.json",
    }
)  # fmt: skip
BUILT_IN = ("lowrank/demo", "lowrank/demo-heldout")


def data_files(places: Places) -> list[dict[str, Any]]:
    """Files that may be data: name, bytes, when changed; uploads first, and those that `dataset_info.json` names."""
    found: dict[str, dict[str, Any]] = {}
    for root in (places.uploads, *places.data, places.folder):
        for path in _files(root, _DEEPEST, skip=(places.runs, places.exports)):
            if len(found) < _MOST and path.suffix.lower() in DATA_SUFFIXES and path.name not in _NOT_DATA:
                status = path.stat()
                shown = places.shown(path)
                found.setdefault(shown, {"path": shown, "bytes": status.st_size, "changed": status.st_mtime})
    return list(found.values())


def named_sets(places: Places) -> dict[str, dict[str, Any]]:
    """The entries of `dataset_info.json` files whose file is there: `{name: {"path": ..., "entry": ...}}`."""
    found: dict[str, dict[str, Any]] = {}
    for root in (places.uploads, *places.data):
        try:
            content = json.loads((root / "dataset_info.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        for name, entry in content.items() if isinstance(content, dict) else ():
            file = entry.get("file_name") if isinstance(entry, dict) else None
            if (
                isinstance(file, str)
                and (path := root / file).is_file()
                and path.resolve().is_relative_to(root.resolve())
            ):
                found[str(name)] = {"path": places.shown(path), "entry": entry}
    return found


def _files(root: Path, deep: int, skip: tuple[Path, ...] = ()) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
    found = [Path(e.path) for e in listed if e.is_file(follow_symlinks=False) and not e.name.startswith(".")]
    for entry in listed:
        path = Path(entry.path)
        if deep > 1 and entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and path not in skip:
            found += _files(path, deep - 1, skip)
    return found
