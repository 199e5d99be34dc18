"""The bank: N adapters on one frozen base, each in its slot. N is 1 for a plain fine-tune; there is no other case.

The bank wraps a layer when the first adapter asks for it and owns every trainable tensor: float32
masters, and copies in the compute dtype that `refresh` brings up to date after each optimiser step.
Tensor names are PEFT's, without the leading `base_model.model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.embedding import RoutedCopy, RoutedEmbedding, fresh_embedding_adapter
from lowrank.adapters.experts import RoutedExperts
from lowrank.adapters.fit import misfits
from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.look import Looks
from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.routing import Draws, Routing
from lowrank.adapters.targets import Targets, by_pattern, find_targets, innermost, name_of
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.token_rows import HeadRows, head_tensors, token_ids, token_rows
from lowrank.adapters.variants import AdapterConfig, Site, Tensors, Variant, name_in_files
from lowrank.adapters.virtual import VirtualTokens, runs_of
from lowrank.errors import ModelError, raise_all
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.logprobs import Head
from lowrank.models.base import Base
from lowrank.models.depths import refuse
from lowrank.models.experts import Expert
from lowrank.models.original import original_weight
from lowrank.models.storages import BaseLinear
from lowrank.models.storages.dense import DenseLinear
from lowrank.records import Batch, Segment, with_virtual_tokens

_STATE = "variant "
"""How names of a variant's own state begin."""


@dataclass
class Slot:
    """One adapter: its settings, what it reaches and its trainable tensors by PEFT's names."""

    config: AdapterConfig
    variant: Variant
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and alpha of each adapted module."""
    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    experts: dict[str, LayerAdapter] = field(default_factory=dict)
    """By the full name of the fused parameter."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """What is trained. Frozen tensors are with their layers."""
    copies: tuple[str, ...] = ()
    missed: str | None = None
    """What its `target_modules` could not reach, for the user."""


@dataclass(frozen=True)
class Saved:
    """An adapter as files have it: settings, tensors by PEFT's names, rank and alpha of each module."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, tuple[int, float]]


class Bank:
    """Adapters by slot number on one base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.routing = Routing()
        self.virtual = VirtualTokens(self.routing)
        self.slots: dict[int, Slot] = {}

    def add(self, config: AdapterConfig, *, seed: int, looks: Looks | None = None) -> int:
        """A fresh adapter in the first free slot. Its start depends on `seed` and the layer's name, and where the
        variant asks for it on the job's data (`looks`)."""
        refuse(self.base.model.config, "adapters are for all of them")
        if isinstance(config, PromptSettings):
            return self._add_prompt(config, seed)
        targets = find_targets(self.base.model, config)
        self._check(config, targets)
        number = self._free
        variant = config.build()
        slot = Slot(config, variant, copies=targets.copies, missed=targets.missed)
        routed = {name: self._wrapped(name, RoutedLinear) for name in targets.linears}
        self._begin(variant, config, {name: layer.base for name, layer in routed.items()}, looks)
        problems = [
            problem
            for name, layer in routed.items()
            if (problem := self._add_linear(number, slot, layer, name, _generator(seed, name)))
        ]
        if problems:
            for layer in routed.values():
                layer.adapters.pop(number, None)
        raise_all(ModelError, f"adapter.type {config.type} does not fit these layers", problems)
        for name in targets.embeddings:
            self._add_embedding(number, slot, name, _generator(seed, name))
        for name in targets.parameters:
            self._add_experts(number, slot, name, _generator(seed, name))
        for name in targets.copies:
            routed = self._wrapped(name, RoutedCopy)
            slot.parameters.update({f"{name}.{key}": value for key, value in routed.add(number).items()})
        if config.trainable_token_indices:
            self._add_token_rows(number, slot)
        self.slots[number] = slot
        return number

    def remove(self, number: int) -> None:
        """Free a slot and the memory of its tensors; the layers stay wrapped."""
        del self.slots[number]
        self.virtual.by_slot.pop(number, None)
        for module in self.base.model.modules():
            if isinstance(module, RoutedLinear):
                module.remove(number)
            elif isinstance(module, (RoutedEmbedding, RoutedExperts)):
                module.adapters.pop(number, None)
            if isinstance(module, RoutedEmbedding):
                module.rows.pop(number, None)
            elif isinstance(module, RoutedCopy):
                module.copies.pop(number, None)

    def parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The trainable tensors of a slot, by PEFT's names."""
        return self.slots[number].parameters

    def learning_rate_factors(self, number: int, learning_rate: float) -> list[float]:
        """What the learning rate of each of a slot's parameters is multiplied by (LoRA+), in their order."""
        slot = self.slots[number]
        return [slot.config.learning_rate_factor(*item, learning_rate) for item in slot.parameters.items()]

    def prompted(self, slot: int, segment: Segment) -> Segment:
        """The segment as a slot reads it: behind the slot's virtual tokens, where it has some."""
        return with_virtual_tokens(segment, self.num_virtual(slot))

    def num_virtual(self, slot: int) -> int:
        """Virtual tokens before each of a slot's documents."""
        prompt = self.virtual.by_slot.get(slot)
        return prompt.num_tokens if prompt else 0

    def reach(self, slot: int) -> int | None:
        """Tokens of the longest document a slot reads; None where the base does not say."""
        return None if self.base.reach is None else self.base.reach - self.num_virtual(slot)

    def hidden(self, batch: Batch, draws: Mapping[int, Draws] | None = None) -> torch.Tensor:
        """The last hidden states, (T, D), each segment through its own slot. `batch`: of `prompted` segments, on the
        base's device; `draws`: in training, where random numbers come from."""
        rows = self.base.rows(batch)
        self.routing.set(rows.num_rows, rows.ranges, rows.counter_N, rows.length_N, draws, runs_of(batch))
        return self.base.hidden(batch, training=draws is not None)

    def saved(self, number: int) -> Saved:
        """An adapter in the form in which PEFT knows it, without copies where the tensors are its own."""
        slot = self.slots[number]
        if number in self.virtual.by_slot:
            with torch.no_grad():
                table = self.virtual.by_slot[number].encoder()
            return Saved(slot.config.as_saved(), {TABLE: table.detach()}, {})  # type: ignore[arg-type]
        config: Any = slot.config.as_saved()
        tensors: dict[str, torch.Tensor] = {}
        ranks = {name: slot.variant.settled(name, *_rank_by(config, name)) for name in slot.ranks}
        for name, layer in slot.layers.items():
            own = slot.variant.saved(layer.masters)
            ranks[name] = slot.variant.target_in_files(layer.scale, own) or ranks[name]
            tensors |= {f"{name}.{name_in_files(key)}": tensor.detach() for key, tensor in own.items()}
        of_layers = self._names_of_layers(slot)
        tensors |= {name: value.detach() for name, value in slot.parameters.items() if name not in of_layers}
        by_full_name: dict[str, Any] = {"modules_to_save": slot.copies, "target_parameters": tuple(slot.experts)}
        if config.trainable_token_indices:
            by_full_name["trainable_token_indices"] = token_ids(self.base, slot.config.trainable_token_indices)
        return Saved(config.model_copy(update=by_full_name), tensors, ranks)

    def load(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors`, in the form that `saved` gives, into a slot.

        ModelError lists every name that is missing or unknown and every wrong shape.
        """
        slot, own = self.slots[number], self.saved(number).tensors
        if self._has_encoder(number):
            raise ModelError(f"adapter.type {slot.config.type}: its files do not hold the encoder it is trained with")
        rest, problems = _check_shared(slot.variant, tensors)
        # Rows of the embedding alone, as PEFT may save them: the head's stay as they began.
        rest = {**{name: own[name] for name in own if name.endswith(TOKEN_ROWS) and _has_rows(rest)}, **rest}
        problems += [f"{name}: missing" for name in own if name not in rest]
        problems += [f"{name}: this adapter has no such tensor" for name in rest if name not in own]
        problems += [
            f"{name}: shape {tuple(rest[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in rest and rest[name].shape != own[name].shape
        ]
        raise_all(ModelError, "the tensors do not fit the adapter", problems)
        with torch.no_grad():
            for name, layer in slot.layers.items():
                given = {key: rest[f"{name}.{name_in_files(key)}"] for key in slot.variant.saved(layer.masters)}
                for key, value in slot.variant.restored(given, layer.masters).items():
                    layer.masters[key].copy_(value)
            of_layers = self._names_of_layers(slot)
            for name, parameter in slot.parameters.items():
                if name not in of_layers:
                    parameter.copy_(rest[name])
        self.refresh(number)

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        """Bring what follows from the masters up to date: once per optimiser step, not per forward."""
        copies, masters = [], []
        for name, layer in self.slots[number].layers.items():
            routed = self.base.model.get_submodule(name)
            layer.variant.refresh(routed.base, layer.scale, layer.masters)
        for layer in (*self.slots[number].layers.values(), *self.slots[number].experts.values()):
            if layer.copies is not None:
                copies += layer.copies
                masters += layer.variant.as_low_rank(layer.masters) or ()
        if copies:
            torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateImportUsage]

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

    def state(self, number: int) -> dict[str, torch.Tensor]:
        """What `saved` leaves out and training goes on with, by name; empty where files hold all."""
        slot = self.slots[number]
        if slot.variant.files_hold_all and not self._has_encoder(number):
            return {}
        own = {f"{_STATE}{key}": tensor for key, tensor in slot.variant.state().items()}
        return own | {name: parameter.detach() for name, parameter in slot.parameters.items()}

    @torch.no_grad()
    def load_state(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave; nothing of `saved` is needed then."""
        slot = self.slots[number]
        for name, parameter in slot.parameters.items():
            parameter.copy_(tensors[name])
        own = {key: tensor.to(self.base.device) for key, tensor in tensors.items() if key.startswith(_STATE)}
        slot.variant.load_state({key.removeprefix(_STATE): tensor for key, tensor in own.items()})
        self.refresh(number)

    def penalty(self, number: int) -> torch.Tensor | None:
        """What a slot's variant adds to the loss of each of its optimiser steps."""
        slot = self.slots[number]
        return slot.variant.penalty({name: layer.masters for name, layer in slot.layers.items()})

    def after_update(self, number: int, step: int, num_steps: int) -> None:
        """An optimiser took step `step` (1 is the first) of `num_steps`; its gradients are still there. Comes before
        `refresh`."""
        slot = self.slots[number]
        slot.variant.after_update({name: layer.masters for name, layer in slot.layers.items()}, step, num_steps)

    def _has_encoder(self, number: int) -> bool:
        """Its virtual tokens come from more than their table."""
        return number in self.virtual.by_slot and self.slots[number].parameters.keys() != {TABLE}

    def enable_noise(self) -> None:
        """Let the input embedding add the noise that routing asks for (NEFTune)."""
        self._wrapped(name_of(self.base.model, self.base.model.get_input_embeddings()), RoutedEmbedding)

    @property
    def _free(self) -> int:
        """The first slot that nobody has."""
        return next(index for index in range(len(self.slots) + 1) if index not in self.slots)

    def _add_prompt(self, config: Any, seed: int) -> int:
        """The virtual tokens of some `PromptSettings` in the first free slot."""
        number = self._free
        encoder = self.virtual.add(number, config, self.base, _generator(seed, config.type))
        if not config.of_attention:
            name = name_of(self.base.model, self.base.model.get_input_embeddings())
            self._wrapped(name, RoutedEmbedding).virtual = self.virtual
        self.slots[number] = Slot(config, Variant(), parameters=dict(encoder.named_parameters()))
        return number

    def _check(self, config: AdapterConfig, targets: Targets) -> None:
        slots = self.slots.values()
        copied = {name for slot in slots for name in slot.copies}
        adapted = {name for slot in slots for name in slot.layers}
        if any(slot.config.trainable_token_indices for slot in slots):
            adapted.add(name_of(self.base.model, self.base.model.get_output_embeddings()))
        if config.trainable_token_indices:
            token_ids(self.base, config.trainable_token_indices)
        problems = misfits(self.base.model, config, targets, copied, adapted)
        raise_all(ModelError, "this adapter cannot be attached", problems)

    def _add_experts(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        """An adapter for each expert of a fused parameter, as one pair A (R E, D), B (O, R E)."""
        path, _, key = name.rpartition(".")
        routed: RoutedExperts = self._wrapped(path, RoutedExperts)
        rank, alpha = slot.ranks[name] = _rank_by(slot.config, name)
        scale = slot.variant.scale(rank, alpha)
        fresh = slot.variant.init(Expert(routed.base, key, 0), rank * routed.num_experts, scale, generator)
        masters = {key: self._master(value, trained=True) for key, value in fresh.items()}
        layer = LayerAdapter(slot.variant, scale, masters, self._copies(slot.variant, masters))
        routed.adapters.setdefault(number, {})[key] = slot.experts[name] = layer
        trained = {part: value for part, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update({f"{name}.{name_in_files(part)}": value for part, value in trained.items()})

    def _begin(
        self, variant: Variant, config: AdapterConfig, layers: dict[str, BaseLinear], looks: Looks | None
    ) -> None:
        if layers:
            ranks = {name: _rank_by(config, name)[0] for name in layers}
            site = Site(layers, partial(original_weight, self.base), self.base.device, self._wide, ranks, looks)
            variant.begin(site, config.rank)

    def _add_linear(
        self, number: int, slot: Slot, routed: RoutedLinear, name: str, generator: torch.Generator
    ) -> str | None:
        """Attach a slot to a layer; or the reason why that cannot be."""
        variant = slot.variant
        rank, alpha = variant.settled(name, *_rank_by(slot.config, name))
        if not rank:
            return None
        slot.ranks[name] = rank, alpha
        scale = variant.scale(rank, alpha)
        try:
            fresh = variant.init(routed.base, rank, scale, generator)
        except ValueError as error:
            return f"{name}: {error}"
        masters = {key: self._master(value, key not in variant.frozen) for key, value in fresh.items()}
        layer = LayerAdapter(variant, scale, masters, self._copies(variant, masters), slot.config.dropout)
        routed.adapters[number] = slot.layers[name] = layer
        trained = {key: value for key, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update({f"{name}.{name_in_files(key)}": value for key, value in trained.items()})
        return None

    def _add_embedding(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        routed = self._wrapped(name, RoutedEmbedding)
        rank, alpha = slot.ranks[name] = _rank_by(slot.config, name)
        fresh = fresh_embedding_adapter(routed.num_embeddings, routed.embedding_dim, rank, generator)
        masters = {key: nn.Parameter(value.to(self.base.device, self._wide)) for key, value in fresh.items()}
        routed.adapters[number] = (slot.variant.scale(rank, alpha), {**masters})
        slot.parameters.update({f"{name}.{key}": value for key, value in masters.items()})

    @property
    def _wide(self) -> torch.dtype:
        """Of masters: float32, or float64 where the base has it."""
        return torch.promote_types(self.base.dtype, torch.float32)

    def _add_token_rows(self, number: int, slot: Slot) -> None:
        """Rows of the slot's own in the embedding, and in the head, where that is another tensor."""
        ids = token_ids(self.base, slot.config.trainable_token_indices)
        token_N = torch.tensor(ids, device=self.base.device)
        model = self.base.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name, head_name = name_of(model, embedding), name_of(model, head)
        start_ND = head.weight.detach()[token_N].to(self._wide)
        row_ND = own_ND = nn.Parameter(embedding.weight.detach()[token_N].to(self._wide))
        slot.parameters[f"{name}.{TOKEN_ROWS}"] = row_ND
        if innermost(head).weight is not innermost(embedding).weight:
            own_ND = slot.parameters[f"{head_name}.{TOKEN_ROWS}"] = nn.Parameter(start_ND.clone())
        vocabulary = len(embedding.weight)
        self._wrapped(name, RoutedEmbedding).rows[number] = token_rows(row_ND, token_N, vocabulary)
        masters = head_tensors(own_ND, start_ND, token_N, vocabulary)
        self._wrapped(head_name, RoutedLinear).adapters[number] = LayerAdapter(HeadRows(), 1.0, masters)

    def _master(self, value: torch.Tensor, trained: bool) -> torch.Tensor:
        value = value.to(self.base.device, self._wide)
        return nn.Parameter(value) if trained else value

    def _copies(self, variant: Variant, masters: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B in the compute dtype, if that is not the masters' and the variant wants them kept."""
        low_rank = variant.as_low_rank(masters)
        if low_rank is None or self._wide == self.base.dtype or not variant.keeps_copies:
            return None
        A_RD, B_OR = (tensor.detach().to(self.base.dtype) for tensor in low_rank)
        return A_RD, B_OR

    def _names_of_layers(self, slot: Slot) -> set[str]:
        """Names of the trained tensors of linear layers; the others are saved as they are."""
        return {f"{name}.{name_in_files(key)}" for name, layer in slot.layers.items() for key in layer.masters}

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
            base = module if hasattr(module, "dense_weight") else DenseLinear(module)
            routed: nn.Module = RoutedLinear(base, name, self.routing)
        else:
            routed = kind(module, name, self.routing)
        self.base.model.set_submodule(name, routed)
        return routed


def _rank_by(config: AdapterSettings, name: str) -> tuple[int, float]:
    """Rank and alpha of a module, by PEFT's rules."""
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    return by_pattern(config.rank_pattern, name, config.rank), by_pattern(config.alpha_pattern, name, alpha)


def _has_rows(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(name.endswith(TOKEN_ROWS) for name in tensors)


def _check_shared(variant: Variant, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(all but the tensors that layers share, what is wrong with those)."""
    shared: Tensors = getattr(variant, "shared", {})
    problems = []
    for key, own in shared.items():
        if key in tensors and not torch.equal(tensors[key].to(own), own):
            problems.append(f"{key}: other values than its key gives here; train the adapter anew")
    return {name: tensor for name, tensor in tensors.items() if name not in shared}, problems


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(key_of(seed, name))
