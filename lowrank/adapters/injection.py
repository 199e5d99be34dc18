"""An adapter's tensors into the layers of a base: routed layers take the place of the model's, masters hang in them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.adapters.calibration import CalibrationSteps
from lowrank.adapters.embedding import RoutedCopy, RoutedEmbedding, fresh_embedding_adapter
from lowrank.adapters.expert_lora import RoutedExperts
from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.routing import Routing
from lowrank.adapters.slot import Slot, layer_rank, rank_by, shared_tensors
from lowrank.adapters.targets import Targets, innermost, name_of
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.token_rows import HeadRows, head_tensors, token_ids, token_rows
from lowrank.adapters.variants.base import AdapterSite, SiteSetup, Tensors, Variant
from lowrank.errors import ModelError, raise_all
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.base import Base
from lowrank.models.fused_experts import Expert
from lowrank.models.loading.original_weights import original_weight
from lowrank.models.storages import BaseLinear
from lowrank.models.storages.dense import DenseLinear


class Injector:
    """Layers of one base, wrapped when the first adapter asks for them, and the tensors of slots in them."""

    def __init__(self, base: Base, routing: Routing) -> None:
        self._base, self._routing = base, routing

    def inject(
        self, number: int, slot: Slot, targets: Targets, seed: int, calibration: CalibrationSteps | None
    ) -> None:
        """Fresh tensors of slot `number` in all of `targets`, known to `slot` by PEFT's names.

        `seed`, `calibration`: see `Bank.add`. ModelError lists layers that the variant does not fit; none has it then.
        """
        routed = {name: self.wrapped(name, RoutedLinear) for name in targets.linears}
        self._set_up(slot, {name: layer.base for name, layer in routed.items()}, calibration)
        problems = self._add_linears(number, slot, routed, seed)
        if problems:
            for layer in routed.values():
                layer.adapters.pop(number, None)
        raise_all(ModelError, f"adapter.type {slot.config.type} does not fit these layers", problems)
        for name in targets.embeddings:
            self._add_embedding(number, slot, name, generator_of(seed, name))
        for name in targets.parameters:
            self._add_experts(number, slot, name, generator_of(seed, name))
        for name in targets.copies:
            copy = self.wrapped(name, RoutedCopy)
            slot.parameters.update({f"{name}.{key}": value for key, value in copy.add(number).items()})
        if slot.config.trainable_token_indices:
            self._add_token_rows(number, slot)

    def remove(self, number: int) -> None:
        """Take the tensors of a slot out; the layers stay wrapped."""
        for module in self._base.model.modules():
            if isinstance(module, RoutedLinear):
                module.remove(number)
            elif isinstance(module, (RoutedEmbedding, RoutedExperts)):
                module.adapters.pop(number, None)
            if isinstance(module, RoutedEmbedding):
                module.rows.pop(number, None)
            elif isinstance(module, RoutedCopy):
                module.copies.pop(number, None)

    def wrapped(self, name: str, kind: type) -> Any:
        """The routed layer at `name`, put there if it is not there yet."""
        module = self._base.model.get_submodule(name)
        if isinstance(module, kind):
            return module
        if kind is RoutedCopy and isinstance(module, RoutedEmbedding):  # noise and adapters lie around the copies
            if not isinstance(module.base, RoutedCopy):
                module.base = RoutedCopy(module.base, name, self._routing)
            return module.base
        if kind is RoutedLinear:
            base = module if hasattr(module, "dense_weight") else DenseLinear(module)
            routed: nn.Module = RoutedLinear(base, name, self._routing)
        else:
            routed = kind(module, name, self._routing)
        self._base.model.set_submodule(name, routed)
        return routed

    def trained(self, value: torch.Tensor) -> nn.Parameter:
        """A master that starts from `value`."""
        return nn.Parameter(value.to(self._base.device, self._master_dtype))

    @property
    def _master_dtype(self) -> torch.dtype:
        return float32_or_wider(self._base.dtype)

    def _set_up(self, slot: Slot, layers: dict[str, BaseLinear], calibration: CalibrationSteps | None) -> None:
        """What the variant does once, before its layers."""
        variant, config = slot.variant, slot.config
        if layers and isinstance(variant, SiteSetup):
            ranks = {name: rank_by(config, name)[0] for name in layers}
            weight_of = partial(original_weight, self._base)
            site = AdapterSite(layers, weight_of, self._base.device, self._master_dtype, ranks, calibration)
            variant.setup(site, config.rank)

    def _add_linears(self, number: int, slot: Slot, routed: Mapping[str, RoutedLinear], seed: int) -> list[str]:
        """Attach a slot to these layers; the reasons why that cannot be."""
        problems: list[str] = []
        with self._base.placement.reading() as reading:
            for name, layer in routed.items():
                reading(name)
                problem = self._add_linear(number, slot, layer, name, generator_of(seed, name))
                problems += [problem] if problem else []
        return problems

    def _add_linear(
        self, number: int, slot: Slot, routed: RoutedLinear, name: str, generator: torch.Generator
    ) -> str | None:
        """Attach a slot to a layer; or the reason why that cannot be."""
        variant = slot.variant
        rank, alpha = layer_rank(variant, name, slot.config)
        if not rank:
            return None
        slot.ranks[name] = rank, alpha
        scale = variant.scale(rank, alpha)
        try:
            fresh = variant.init(routed.base, rank, scale, generator)
        except ValueError as error:
            return f"{name}: {error}"
        masters = {key: self._master(value, key not in variant.frozen) for key, value in fresh.items()}
        layer = LayerAdapter(
            variant, scale, masters, self._compute_dtype_weights(variant, masters), slot.config.dropout
        )
        routed.adapters[number] = slot.layers[name] = layer
        trained = {key: value for key, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update(
            {f"{name}.{slot.config.peft.name_in_files(key)}": value for key, value in trained.items()}
        )
        return None

    def _add_experts(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        """An adapter for each expert of a fused parameter, as one pair A (R E, D), B (O, R E)."""
        path, _, key = name.rpartition(".")
        routed: RoutedExperts = self.wrapped(path, RoutedExperts)
        rank, alpha = slot.ranks[name] = rank_by(slot.config, name)
        scale = slot.variant.scale(rank, alpha)
        fresh = slot.variant.init(Expert(routed.base, key, 0), rank * routed.num_experts, scale, generator)
        masters = {key: self._master(value, trained=True) for key, value in fresh.items()}
        layer = LayerAdapter(slot.variant, scale, masters, self._compute_dtype_weights(slot.variant, masters))
        routed.adapters.setdefault(number, {})[key] = slot.experts[name] = layer
        trained = {part: value for part, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update(
            {f"{name}.{slot.config.peft.name_in_files(part)}": value for part, value in trained.items()}
        )

    def _add_embedding(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        routed = self.wrapped(name, RoutedEmbedding)
        rank, alpha = slot.ranks[name] = rank_by(slot.config, name)
        fresh = fresh_embedding_adapter(routed.num_embeddings, routed.embedding_dim, rank, generator)
        masters = {key: nn.Parameter(value.to(self._base.device, self._master_dtype)) for key, value in fresh.items()}
        routed.adapters[number] = (slot.variant.scale(rank, alpha), {**masters})
        slot.parameters.update({f"{name}.{key}": value for key, value in masters.items()})

    def _add_token_rows(self, number: int, slot: Slot) -> None:
        """Rows of the slot's own in the embedding, and in the head, where that is another tensor."""
        ids = token_ids(self._base, slot.config.trainable_token_indices)
        token_N = torch.tensor(ids, device=self._base.device)
        model = self._base.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name, head_name = name_of(model, embedding), name_of(model, head)
        start_ND = head.weight.detach()[token_N].to(self._master_dtype)
        row_ND = own_ND = nn.Parameter(embedding.weight.detach()[token_N].to(self._master_dtype))
        slot.parameters[f"{name}.{TOKEN_ROWS}"] = row_ND
        if innermost(head).weight is not innermost(embedding).weight:
            own_ND = slot.parameters[f"{head_name}.{TOKEN_ROWS}"] = nn.Parameter(start_ND.clone())
        vocabulary = len(embedding.weight)
        self.wrapped(name, RoutedEmbedding).rows[number] = token_rows(row_ND, token_N, vocabulary)
        masters = head_tensors(own_ND, start_ND, token_N, vocabulary)
        self.wrapped(head_name, RoutedLinear).adapters[number] = LayerAdapter(HeadRows(), 1.0, masters)

    def _master(self, value: torch.Tensor, trained: bool) -> torch.Tensor:
        return self.trained(value) if trained else value.to(self._base.device, self._master_dtype)

    def _compute_dtype_weights(self, variant: Variant, masters: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B in the compute dtype, if that is not the masters' and their layers share none."""
        low_rank = variant.as_low_rank(masters)
        if low_rank is None or self._master_dtype == self._base.dtype or shared_tensors(variant):
            return None
        A_RD, B_OR = (tensor.detach().to(self._base.dtype) for tensor in low_rank)
        return A_RD, B_OR


def generator_of(seed: int, name: str) -> torch.Generator:
    """What the tensors of one layer start from, whatever the other layers are."""
    return torch.Generator().manual_seed(key_of(seed, name))
