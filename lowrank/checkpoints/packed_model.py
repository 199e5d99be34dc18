"""A packed base on disk, as transformers and bitsandbytes read it; we read it too, without packing again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.checkpoints.atomic import new_folder
from lowrank.errors import ModelError
from lowrank.models.prequantised.bnb import as_config, as_tensors
from lowrank.models.quiet import quiet_transformers
from lowrank.models.storages.packed import PackedLinear


def save_packed(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model whose linears are nf4, fp4 or int8 to `folder`, whole or not at all.

    ModelError if nothing in it is packed, or something in a way that bitsandbytes has no format for.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise ModelError(f"{type(model).__name__} has no quantised layers to write")
    state = dict(model.state_dict())
    for name, module in packed.items():
        inner = f"{name}."
        for key in [key for key in state if key.startswith(inner) and key != f"{inner}bias"]:
            del state[key]
        state.update({inner + suffix: tensor for suffix, tensor in as_tensors(module).items()})
    others = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    first = next(iter(packed.values()))
    with new_folder(Path(folder)) as partial, quiet_transformers():
        model.config.quantization_config = as_config(packed, others, first.dtype)
        try:
            model.save_pretrained(partial, state_dict=state)
        finally:
            del model.config.quantization_config
        tokenizer.save_pretrained(partial)
