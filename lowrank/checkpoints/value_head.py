"""A value head on disk: `value_head.safetensors` with one tensor, `score.weight` (1, D), beside its adapter or model.

The name and shape are those of transformers' sequence classification, which a reward model is one of.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.tensor_file import read_tensors, write_tensors
from lowrank.errors import ModelError

FILE = "value_head.safetensors"
_NAME = "score.weight"
_OF, _CRITIC = "value_head_of", "critic"
"""In the file's header: it is PPO's critic, which gives no answer its reward."""


def write_value_head(folder: Path, value_D: torch.Tensor, *, critic: bool = False) -> None:
    """Into a folder that someone else makes durable. `critic`: it is PPO's, not a reward model's."""
    write_tensors(folder / FILE, {_NAME: value_D[None]}, metadata={_OF: _CRITIC} if critic else None)


def is_critic(folder: Path) -> bool:
    """Whether the value head of the folder, which has one that was read, is PPO's critic."""
    with safe_open(current(folder) / FILE, framework="pt") as file:
        return (file.metadata() or {}).get(_OF) == _CRITIC


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
