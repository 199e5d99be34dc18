"""A model folder as transformers saves it, read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open

from lowrank.errors import ModelError
from lowrank.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Checkpoint:
    """What is in the folder. `files`: the file of every tensor, by the tensor's name; `shapes` likewise."""

    folder: Path
    config: dict[str, Any]
    """Of the text model, with every key that transformers fills in by default."""
    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    """In safetensors' words: BF16, F16, F32."""

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.config["model_type"]


class Reader:
    """Open files of a checkpoint; a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it was saved."""
        path = self._checkpoint.files[name]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path].get_tensor(name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Look at a folder without reading its weights. Raises ModelError: files missing or damaged."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder as transformers saves it")
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(folder).get_text_config().to_dict()
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: transformers does not know this config.json: {error}") from error
    files: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in _weight_files(folder):
        for name, shape, dtype in _contents(path):
            files[name], shapes[name], dtypes[name] = path, shape, dtype
    return Checkpoint(folder, config, files, shapes, dtypes)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder}: {len(missing)} of {len(names)} weight files missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(f"{folder}: no model.safetensors and no model.safetensors.index.json")


def _contents(path: Path) -> Iterator[tuple[str, tuple[int, ...], str]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                part = file.get_slice(name)
                yield name, tuple(part.get_shape()), part.get_dtype()
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged, or not downloaded to its end: {error}") from error
