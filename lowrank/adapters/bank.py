"""The bank: N adapters on one frozen base, each in its slot. N is 1 for a plain fine-tune; there is no other case.

The bank wraps a layer when the first adapter asks for it and owns every trainable tensor: float32
masters, and copies in the compute dtype that `refresh` brings up to date after each optimiser step.
Tensor names are PEFT's, without the leading `base_model.model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.adapters.embedding import RoutedCopy, RoutedEmbedding, fresh_embedding_adapter
from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.routing import Routing
from lowrank.adapters.targets import Targets, by_pattern, find_targets, is_row_by_row
from lowrank.adapters.variants import AdapterConfig, Tensors, Variant
from lowrank.errors import ModelError, raise_all
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.logprobs import Head
from lowrank.models.base import Base
from lowrank.models.storages import StorageConfig
from lowrank.models.storages.dense import DenseLinear


@dataclass
class Slot:
    """One adapter: its settings, what it reaches and its trainable tensors by PEFT's names."""

    config: AdapterConfig
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and alpha of each adapted module."""
    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    missed: str | None = None
    """What its `target_modules` could not reach, for the user."""


class Bank:
    """Adapters by slot number on one base."""

    def __init__(self, base: Base, storage: StorageConfig) -> None:
        self.base = base
        self.storage = storage
        self.routing = Routing()
        self.slots: dict[int, Slot] = {}

    def add(self, config: AdapterConfig, *, seed: int) -> int:
        """A fresh adapter in the first free slot. Its start depends on `seed` and the layer's name, on nothing else."""
        targets = find_targets(self.base.model, config)
        self._check(config, targets)
        number = next(index for index in range(len(self.slots) + 1) if index not in self.slots)
        slot = Slot(config, copies=targets.copies, missed=targets.missed)
        variant = config.build()
        for name in targets.linears:
            self._add_linear(number, slot, variant, name, _generator(seed, name))
        for name in targets.embeddings:
            self._add_embedding(number, slot, variant, name, _generator(seed, name))
        for name in targets.copies:
            routed = self._wrapped(name, RoutedCopy)
            slot.parameters.update({f"{name}.{key}": value for key, value in routed.add(number).items()})
        self.slots[number] = slot
        return number

    def remove(self, number: int) -> None:
        """Free a slot and the memory of its tensors; the layers stay wrapped."""
        del self.slots[number]
        for module in self.base.model.modules():
            if isinstance(module, (RoutedLinear, RoutedEmbedding)):
                module.adapters.pop(number, None)
            elif isinstance(module, RoutedCopy):
                module.copies.pop(number, None)

    def parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The trainable tensors of a slot, by PEFT's names."""
        return self.slots[number].parameters

    def load(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors` into a slot. ModelError lists every name that is missing or unknown and every wrong shape."""
        own = self.parameters(number)
        problems = [f"{name}: missing" for name in own if name not in tensors]
        problems += [f"{name}: this adapter has no such tensor" for name in tensors if name not in own]
        problems += [
            f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        raise_all(ModelError, "the tensors do not fit the adapter", problems)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self.refresh(number)

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        """Bring the compute-dtype copies up to date with the masters: once per optimiser step, not per forward."""
        working, masters = [], []
        for layer in self.slots[number].layers.values():
            if layer.working is not layer.masters:
                working += list(layer.working.values())
                masters += list(layer.masters.values())
        if working:
            torch._foreach_copy_(working, masters)  # pyright: ignore[reportPrivateImportUsage]

    def head(self, number: int) -> Head:
        """The head as a slot sees it (-1: the bare base)."""
        head = self.base.head()
        module = self.base.model.get_output_embeddings()
        if isinstance(module, RoutedCopy) and number in module.copies:
            own = module.copies[number]
            assert isinstance(own.weight, torch.Tensor)
            return Head(own.weight, getattr(own, "bias", None), head.multiplier, head.softcap)
        if isinstance(module, RoutedLinear) and number in module.adapters:
            layer = module.adapters[number]
            low_rank = layer.variant.as_low_rank(layer.masters)
            assert low_rank is not None, "checked in _check"
            return Head(head.weight_VD, head.bias_V, head.multiplier, head.softcap, (*low_rank, layer.scale))
        return head

    def enable_noise(self) -> None:
        """Let the input embedding add the noise that routing asks for (NEFTune)."""
        self._wrapped(self._name_of(self.base.model.get_input_embeddings()), RoutedEmbedding)

    def _check(self, config: AdapterConfig, targets: Targets) -> None:
        head = self._name_of(self.base.model.get_output_embeddings())
        problems = []
        if head in targets.linears and config.dropout:
            problems.append(
                f"adapter.dropout does not reach {head}, which is a target: set it to 0 or leave {head} out"
            )
        special = [name for name in targets.linears if name == head] + list(targets.embeddings)
        if special and not _is_low_rank(config):
            problems.append(f"adapter.type {config.type} is no low-rank update: leave {', '.join(special)} out")
        both = {*targets.linears, *targets.embeddings} & set(targets.copies)
        if both:
            problems.append(f"both in target_modules and modules_to_save: {', '.join(sorted(both))}")
        for name in targets.copies:
            module = self.base.model.get_submodule(name)
            if not is_row_by_row(module):
                kind = type(module).__name__
                problems.append(f"modules_to_save: {name} is a {kind}; name linear layers, embeddings or norms in it")
        # One wrapper per linear layer: it is adapted for all slots or a copy for all slots.
        copied = {name for slot in self.slots.values() for name in slot.copies}
        adapted = {name for slot in self.slots.values() for name in slot.layers}
        clash = (set(targets.linears) & copied) | (set(targets.copies) & adapted)
        problems += [
            f"{name}: one job adapts it and another trains a copy; use one of the two" for name in sorted(clash)
        ]
        raise_all(ModelError, "this adapter cannot be attached", problems)

    def _add_linear(self, number: int, slot: Slot, variant: Variant, name: str, generator: torch.Generator) -> None:
        routed = self._wrapped(name, RoutedLinear)
        rank, alpha = self._rank(slot, name)
        scale = variant.scale(rank, alpha)
        fresh = variant.init(routed.base, rank, scale, generator)
        masters, working = self._trainable(fresh)
        layer = LayerAdapter(variant, scale, masters, working, slot.config.dropout)
        routed.adapters[number] = slot.layers[name] = layer
        slot.parameters.update({f"{name}.{key}.weight": value for key, value in masters.items()})

    def _add_embedding(self, number: int, slot: Slot, variant: Variant, name: str, generator: torch.Generator) -> None:
        routed = self._wrapped(name, RoutedEmbedding)
        rank, alpha = self._rank(slot, name)
        fresh = fresh_embedding_adapter(routed.num_embeddings, routed.embedding_dim, rank, generator)
        masters, _ = self._trainable(fresh)
        routed.adapters[number] = (variant.scale(rank, alpha), {**masters})
        slot.parameters.update({f"{name}.{key}": value for key, value in masters.items()})

    def _rank(self, slot: Slot, name: str) -> tuple[int, float]:
        config = slot.config
        rank = by_pattern(config.rank_pattern, name, config.rank)
        alpha = by_pattern(config.alpha_pattern, name, config.alpha if config.alpha is not None else 2.0 * config.rank)
        slot.ranks[name] = (rank, alpha)
        return rank, alpha

    def _trainable(self, fresh: Mapping[str, torch.Tensor]) -> tuple[dict[str, nn.Parameter], Tensors]:
        """(float32 or wider masters, copies in the compute dtype), on the base's device."""
        wide = torch.promote_types(self.base.dtype, torch.float32)
        masters = {key: nn.Parameter(value.to(self.base.device, wide)) for key, value in fresh.items()}
        if wide == self.base.dtype:
            return masters, masters  # the same dict: nothing to refresh
        return masters, {key: value.detach().to(self.base.dtype) for key, value in masters.items()}

    def _wrapped(self, name: str, kind: type) -> Any:
        """The routed layer at `name`, put there if it is not there yet."""
        module = self.base.model.get_submodule(name)
        if isinstance(module, kind):
            return module
        if kind is RoutedCopy and isinstance(module, RoutedEmbedding):  # noise and adapters lie around the copies
            if not isinstance(module.base, RoutedCopy):
                module.base = RoutedCopy(module.base, name, self.routing)
            return module.base
        if kind is RoutedLinear:
            base = module if hasattr(module, "dense_weight") else self.storage.wrap(module)
            routed: nn.Module = RoutedLinear(base, name, self.routing)
        else:
            routed = kind(module, name, self.routing)
        self.base.model.set_submodule(name, routed)
        return routed

    def _name_of(self, wanted: nn.Module) -> str:
        return next(name for name, module in self.base.model.named_modules() if module is wanted)


def _is_low_rank(config: AdapterConfig) -> bool:
    """Whether its variant is an update A, B, which heads and embeddings need; tried on a tiny layer."""
    variant, tiny = config.build(), DenseLinear(nn.Linear(2, 2))
    return variant.as_low_rank(variant.init(tiny, 1, 1.0, torch.Generator())) is not None


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(key_of(seed, name))
