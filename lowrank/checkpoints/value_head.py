"""A value head on disk: `value_head.safetensors` with one tensor, `score.weight` (1, D), beside its adapter or model.

The name and shape are those of transformers' sequence classification, which a reward model is one of.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.errors import ModelError

FILE = "value_head.safetensors"
_NAME = "score.weight"


def write_value_head(folder: Path, value_D: torch.Tensor) -> None:
    """Into a folder that someone else makes durable."""
    write_tensors(folder / FILE, {_NAME: value_D[None]})


def read_value_head(folder: Path) -> torch.Tensor | None:
    """(D), or None if the folder has none. Raises ModelError for a file that holds something else."""
    path = current(folder) / FILE
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    if set(tensors) != {_NAME} or tensors[_NAME].ndim != 2 or len(tensors[_NAME]) != 1:
        there = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ModelError(f"{path}: expected {_NAME} (1, hidden size), got {there or 'nothing'}")
    return tensors[_NAME][0]
