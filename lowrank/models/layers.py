"""The decoder layers of a model: the one list of them that every transformers model has."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: Any) -> nn.ModuleList | None:
    """None where there is no such list, or several (encoder and decoder)."""
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(each, GradientCheckpointingLayer) for each in module)
    ]
    return stacks[0] if len(stacks) == 1 else None
