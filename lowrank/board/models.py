"""Models that lie within the folders of the board, known by their files; nothing is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lowrank.board.places import Places
from lowrank.board.runs import read_json
from lowrank.pipelines.resolve import ArtifactKind, resolve

TINY = {"path": "lowrank/tiny", "kind": "llama", "bytes": 5_900_000, "chat": True}
"""The base that ships with lowrank."""
_DEEPEST = 4
_MOST = 200
_SKIPPED = frozenset({"checkpoints", "node_modules", "__pycache__"})


def models_in(places: Places) -> list[dict[str, Any]]:
    """Each model folder: where it lies, what it says it is, its bytes, whether it brings a chat template."""
    found: list[dict[str, Any]] = [TINY]
    for root in (places.folder, *places.models):
        for folder in _folders(root, _DEEPEST):
            if len(found) >= _MOST:
                return found
            known = described(folder)
            if known is not None:
                found.append({"path": places.shown(folder), **known})
    return found


def described(folder: Path) -> dict[str, Any] | None:
    """What a folder with a model is; None for any other."""
    weights = [path for path in folder.glob("*.safetensors") if path.is_file()]
    if not weights or resolve(str(folder)).kind is not ArtifactKind.MODEL:
        return None
    content = read_json(folder / "config.json")
    kind = content.get("model_type")
    if not isinstance(kind, str):
        return None
    tokenizer = read_json(folder / "tokenizer_config.json")
    chat = (folder / "chat_template.jinja").is_file() or bool(tokenizer.get("chat_template"))
    return {"kind": kind[:60], "bytes": sum(path.stat().st_size for path in weights), "chat": chat}


def _folders(root: Path, deep: int) -> list[Path]:
    """The folder and those below it, without links: they may lead anywhere."""
    found = [root]
    try:
        with os.scandir(root) as entries:
            below = sorted(entry.path for entry in entries if _walkable(entry))
    except OSError:
        return found
    for path in below if deep > 1 else ():
        found += _folders(Path(path), deep - 1)
    return found


def _walkable(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.name not in _SKIPPED and entry.is_dir(follow_symlinks=False)
