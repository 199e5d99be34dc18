"""Whole models on disk, in transformers' layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.atomic import new_folder
from lowrank.checkpoints.model_config import rewrite_config
from lowrank.models.loading.quiet import quiet_transformers


def save_full(folder: Path, model: Any, also: Callable[[Path], Any]) -> None:
    """Write a trained model to `folder`, whole or not at all, as `from_pretrained` reads it.

    Layers that lowrank wrapped are written under the names they had. `also` writes more files into the folder (a
    tokenizer).
    """
    with new_folder(Path(folder)) as partial, quiet_transformers():
        model.save_pretrained(partial, state_dict=unwrapped_state(model))
        rewrite_config(partial)
        also(partial)


def unwrapped_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`model.state_dict()` with the names the model had before lowrank wrapped any of its layers."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if getattr(module, "is_routed", False):
            inner = f"{name}.base."
            own = [key for key in state if key.startswith(inner)]
            state.update({f"{name}.{key.removeprefix(inner)}": state.pop(key) for key in own})
    return state
