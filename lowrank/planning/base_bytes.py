"""Bytes of a base, part by part, before a weight is read: decoder layers, embedding, head, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.models.config import ModelConfig
from lowrank.models.layers import Parts, decoder_layers
from lowrank.models.loading.pretrained import choose_device
from lowrank.planning.fake_copies import fake_copies
from lowrank.planning.fake_modules import fake_packed_weights
from lowrank.planning.layers import kinds_of_layers
from lowrank.planning.simulation import skeleton


@dataclass(frozen=True)
class BaseBytes:
    """Bytes of frozen weights as they are kept."""

    layers: tuple[int, ...]
    """Of each decoder layer."""
    embedding: int
    head: int
    """0: it is tied to the embedding."""
    rest: int
    """Norms and what is beside the language model."""
    kinds: tuple[int, ...]
    """For each decoder layer the number of the first that is like it."""
    tower: int = 0
    """What of the rest is in towers, and between them and the language model."""

    @property
    def total(self) -> int:
        """Bytes of the whole base: decoder layers, embedding, head and the rest."""
        return sum(self.layers) + self.embedding + self.head + self.rest

    @property
    def largest_layer(self) -> int:
        """Of the largest decoder layer."""
        return max(self.layers, default=0)


def base_bytes(settings: ModelConfig, config: Any) -> BaseBytes:
    """Of the whole model, as it is before adapters come. Nothing runs through it: a pass through eighty layers is what
    the simulated few are there to spare."""
    with FakeTensorMode(allow_non_fake_inputs=True), fake_copies():
        model, _ = skeleton(settings, config, choose_device(settings))
        packed = fake_packed_weights(model, settings.storage)
        names = {module: name for name, module in model.named_modules()}
        layers = [_bytes_in(layer, names[layer], packed) for layer in decoder_layers(model) or ()]
        embedding: Any = model.get_input_embeddings()
        head_weight: torch.Tensor | None = getattr(model.get_output_embeddings(), "weight", None)
        tied = head_weight is None or head_weight is embedding.weight
        ends = [_bytes(embedding.weight), 0 if head_weight is None or tied else _bytes(head_weight)]
        rest = _bytes_in(model, "", packed) - sum(layers) - sum(ends)
        where = Parts(model)
        outside = [each for name, each in _tensors(model) if where.is_outside(name)]
        tower = sum(map(_bytes, outside)) + sum(size for name, size in packed.items() if where.is_outside(name))
        return BaseBytes(tuple(layers), ends[0], ends[1], rest, tuple(kinds_of_layers(model)), tower)


def _bytes_in(module: nn.Module, name: str, packed: dict[str, int]) -> int:
    prefix = f"{name}." if name else ""
    own = sum(size for each, size in packed.items() if each.startswith(prefix))
    return own + sum(_bytes(each) for _, each in _tensors(module))


def _tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
