"""Block expansion (LLaMA Pro, arXiv:2401.02415): copies of decoder layers that add nothing, until they are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.models.layer_wrappers import refuse_wrapped
from lowrank.models.layers import decoder_layers

_WRITERS = ("o_proj", "down_proj")
"""What writes to the residual stream: at zero, the layer hands on what it was given."""


def expand(model: Any, num_new: int) -> None:
    """Insert `num_new` layers at even distances, each a copy of the one before it that changes nothing yet.

    ModelError where the layers do not divide so, or where a copy would change what the model computes.
    """
    refuse_wrapped(model.config, "no copies are made of such layers")
    layers = decoder_layers(model)
    config = model.config.get_text_config()
    if layers is None:
        raise ModelError(f"{type(model).__name__} has no one stack of decoder layers to expand")
    if num_new < 1 or len(layers) % num_new:
        divisors = [number for number in range(1, len(layers) + 1) if len(layers) % number == 0]
        raise ModelError(f"{len(layers)} layers cannot be expanded by {num_new}; choose one of {divisors}")
    token = torch.arange(3, 19, device=model.device).remainder(config.vocab_size)[None]
    with torch.no_grad():
        before = model(token, use_cache=False).logits
    stride = len(layers) // num_new
    grown: list[Any] = []
    for index, layer in enumerate(layers):
        grown.append(layer)
        if (index + 1) % stride == 0:
            grown.append(_that_adds_nothing(layer))
    del layers[:]
    layers.extend(grown)
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [each for i, kind in enumerate(kinds) for each in [kind] * (1 + ((i + 1) % stride == 0))]
    config.num_hidden_layers = len(grown)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010 (torch types it as a tensor)
    with torch.no_grad():
        after = model(token, use_cache=False).logits
    if not torch.equal(before, after):
        raise ModelError(
            f"{type(model).__name__}: a layer whose {' and '.join(_WRITERS)} are zero still changes what the model "
            "computes, so it cannot be expanded; train an adapter"
        )


def _that_adds_nothing(layer: Any) -> Any:
    new = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if any(writer in name.split(".") for writer in _WRITERS):
                parameter.zero_()
    return new
