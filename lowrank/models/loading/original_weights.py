"""Single weights of a checkpoint, read again from its files: what a layer was before it was quantized."""

from __future__ import annotations

import torch

from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.loading.checkpoint_files import checkpoint_files, stored_tensors
from lowrank.models.loading.pretrained import locate


def original_weight(base: Base, layer: str) -> torch.Tensor:
    """The weight (O, D) of the linear layer named `layer`; only its own bytes are read.

    Raises ModelError where the checkpoint has no such tensor: under another name, fused with others, or quantized.
    """
    try:
        tensors = stored_tensors(checkpoint_files(locate(base.name), base.revision))
    except (OSError, ValueError):  # neither a folder nor a hub name, or one without safetensors
        tensors = {}
    for name in (f"{layer}.weight", f"{layer}.weight".removeprefix(f"{base.model.base_model_prefix}.")):
        if name in tensors:
            weight = tensors[name].read()
            inner = getattr(base.model.get_submodule(layer), "base", None)
            return weight.t() if getattr(inner, "transposed", False) else weight
    raise ModelError(
        f"{base.name}: its safetensors hold no tensor '{layer}.weight', so the weight before quantization is not "
        "known; give the unquantized checkpoint as model.path, or use lora"
    )
