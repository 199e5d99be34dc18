"""The bank: N adapters on one frozen base, each in its slot. N is 1 for a plain fine-tune; there is no other case.

The bank wraps a layer when the first adapter asks for it and owns every trainable tensor: float32
masters, and copies in the compute dtype that `refresh` brings up to date after each optimizer step.
Tensor names are PEFT's, without the leading `base_model.model.`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from lowrank.adapters.blocks import AdaptedBlocks
from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.calibration import CalibrationSteps
from lowrank.adapters.embedding import RoutedCopy, RoutedEmbedding, fresh_embedding_adapter
from lowrank.adapters.expert_lora import RoutedExperts
from lowrank.adapters.linear import LayerAdapter, RoutedLinear
from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.routing import Draws, ForwardContext, Routing
from lowrank.adapters.slot import SavedAdapter, Slot, layer_rank, load_tensors, rank_by, saved_form, shared_tensors
from lowrank.adapters.soft_prompts import VirtualTokens, runs_of
from lowrank.adapters.targets import Targets, find_targets, innermost, name_of
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.token_rows import HeadRows, head_tensors, token_ids, token_rows
from lowrank.adapters.validation import misfits
from lowrank.adapters.variants import (
    AdapterConfig,
    AdapterSite,
    SiteSetup,
    Tensors,
    TrainingHooks,
    Variant,
    reads_all_from_files,
)
from lowrank.batches import BARE_BASE, Batch
from lowrank.errors import ModelError, raise_all
from lowrank.kernels.counter_random import key_of
from lowrank.kernels.logprobs import Head
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.base import Base
from lowrank.models.fused_experts import Expert
from lowrank.models.layer_wrappers import refuse_wrapped
from lowrank.models.layers import decoder_layers
from lowrank.models.loading.original_weights import original_weight
from lowrank.models.storages import BaseLinear
from lowrank.models.storages.dense import DenseLinear
from lowrank.segments import Segment, with_virtual_tokens

_STATE = "variant "
"""How names of a variant's own state begin."""


class Bank:
    """Adapters by slot number on one base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.routing = Routing()
        self.virtual = VirtualTokens(self.routing)
        self.blocks = AdaptedBlocks(self.routing)
        self.slots: dict[int, Slot] = {}
        self.times_added = 0
        """Adapters that have come so far; another one may have wrapped more layers, in a slot that had one before."""

    def add(
        self, config: AdapterConfig, *, seed: int, looks: CalibrationSteps | None = None, slot: int | None = None
    ) -> int:
        """A fresh adapter in the first free slot, or in `slot`, where a run goes on. Its start depends on `seed` and
        the layer's name, and where the variant asks for it on the job's data (`looks`)."""
        refuse_wrapped(self.base.model.config, "adapters are not trained on such layers")
        if self.base.routed_by not in (None, self.routing):
            raise ModelError(
                f"{self.base.name}: the adapters of another Bank are in its layers already, and this one's would have "
                "no part in them; add to that bank, or load the base once more"
            )
        self.base.routed_by, self.base.tower_pass = self.routing, self.tower_pass
        if isinstance(config, PromptSettings):
            return self._add_prompt(config, seed, self._free(slot))
        if isinstance(config, BottleneckSettings):
            return self._add_bottleneck(config, seed, self._free(slot))
        targets = find_targets(self.base.model, config)
        self._check(config, targets)
        number = self._free(slot)
        variant = config.build()
        own = Slot(config, variant, copies=targets.copies, missed=targets.missed, outside=targets.outside)
        routed = {name: self._wrapped(name, RoutedLinear) for name in targets.linears}
        self._begin(variant, config, {name: layer.base for name, layer in routed.items()}, looks)
        problems = self._add_linears(number, own, routed, seed)
        if problems:
            for layer in routed.values():
                layer.adapters.pop(number, None)
        raise_all(ModelError, f"adapter.type {config.type} does not fit these layers", problems)
        for name in targets.embeddings:
            self._add_embedding(number, own, name, _generator(seed, name))
        for name in targets.parameters:
            self._add_experts(number, own, name, _generator(seed, name))
        for name in targets.copies:
            routed = self._wrapped(name, RoutedCopy)
            own.parameters.update({f"{name}.{key}": value for key, value in routed.add(number).items()})
        if config.trainable_token_indices:
            self._add_token_rows(number, own)
        self.slots[number] = own
        return number

    def remove(self, number: int) -> None:
        """Free a slot and the memory of its tensors; the layers stay wrapped."""
        del self.slots[number]
        self.virtual.by_slot.pop(number, None)
        self.blocks.remove(number)
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

    def max_positions(self, slot: int) -> int | None:
        """Tokens of the longest document a slot reads; None where the base does not say."""
        return None if self.base.max_positions is None else self.base.max_positions - self.num_virtual(slot)

    def hidden(self, batch: Batch, draws: Mapping[int, Draws] | None = None) -> torch.Tensor:
        """The last hidden states, (T, D), each segment through its own slot. `batch`: of `prompted` segments, on the
        base's device; `draws`: in training, where random numbers come from."""
        if self.base.layout_of(batch) != self.base.layout and any(map(self.num_virtual, batch.slots)):
            raise ModelError(
                f"{self.base.name}: an adapter of virtual tokens cannot be shown media here: its rows are padded"
            )
        with self.routing.using(self.context(batch, draws)):
            return self.base.hidden(batch, training=draws is not None)

    def context(self, batch: Batch, draws: Mapping[int, Draws] | None = None) -> ForwardContext:
        """What the layers know about the rows of `batch` in a pass of it; arguments as of `hidden`."""
        rows = self.base.rows(batch)
        return ForwardContext(rows.num_rows, rows.ranges, rows.counter_N, rows.length_N, draws or {}, runs_of(batch))

    @contextlib.contextmanager
    def tower_pass(self, slot: int, origin_1: torch.Tensor) -> Generator[None, None, None]:
        """The pass of the tower over the pictures of one document of a slot: all of its rows are that slot's. With a
        graph where the slot trains something there. `origin_1`: `Segment.origin` of the document, (1)."""
        trained = torch.is_grad_enabled() and slot in self.slots and self.slots[slot].outside
        draws = self.routing.current.draws
        context = ForwardContext(1, ((slot, 0, 1),), origin_1, draws={} if slot == BARE_BASE else draws)
        with self.routing.using(context), torch.set_grad_enabled(trained):
            yield

    def saved(self, number: int) -> SavedAdapter:
        """An adapter in the form in which PEFT knows it, without copies where the tensors are its own."""
        slot = self.slots[number]
        if number in self.virtual.by_slot:
            with torch.no_grad():
                table = self.virtual.by_slot[number].encoder()
            return SavedAdapter(slot.config.as_saved(), {TABLE: table.detach()}, {})  # type: ignore[arg-type]
        return saved_form(slot, self.base)

    def load(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy `tensors`, in the form that `saved` gives, into a slot.

        ModelError lists every name that is missing or unknown and every wrong shape.
        """
        slot = self.slots[number]
        if self._has_encoder(number):
            raise ModelError(f"adapter.type {slot.config.type}: its files do not hold the encoder it is trained with")
        load_tensors(slot, self.saved(number).tensors, tensors)
        self.refresh(number)

    @torch.no_grad()
    def refresh(self, number: int) -> None:
        """Bring what follows from the masters up to date: once per optimizer step, not per forward."""
        copies, masters = [], []
        with self.base.placement.reading() as reading:
            for name, layer in self.slots[number].layers.items():
                variant = layer.variant
                if isinstance(variant, TrainingHooks) and type(variant).refresh is not TrainingHooks.refresh:
                    reading(name)
                    base = self.base.model.get_submodule(name).base
                    variant.refresh(base, layer.scale, layer.masters)
        for layer in (*self.slots[number].layers.values(), *self.slots[number].experts.values()):
            if layer.copies is not None:
                copies += layer.copies
                masters += layer.variant.as_low_rank(layer.masters) or ()
        if copies:
            torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

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
        if reads_all_from_files(slot.variant) and not self._has_encoder(number):
            return {}
        own = slot.variant.state() if isinstance(slot.variant, TrainingHooks) else {}
        return {f"{_STATE}{key}": tensor for key, tensor in own.items()} | {
            name: parameter.detach() for name, parameter in slot.parameters.items()
        }

    @torch.no_grad()
    def load_state(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave; nothing of `saved` is needed then."""
        slot = self.slots[number]
        for name, parameter in slot.parameters.items():
            parameter.copy_(tensors[name])
        own = {key: tensor.to(self.base.device) for key, tensor in tensors.items() if key.startswith(_STATE)}
        if isinstance(slot.variant, TrainingHooks):
            slot.variant.load_state({key.removeprefix(_STATE): tensor for key, tensor in own.items()})
        self.refresh(number)

    def penalty(self, number: int) -> torch.Tensor | None:
        """What a slot's variant adds to the loss of each of its optimizer steps."""
        slot = self.slots[number]
        if not isinstance(slot.variant, TrainingHooks):
            return None
        return slot.variant.penalty({name: layer.masters for name, layer in slot.layers.items()})

    def after_update(self, number: int, step: int, num_steps: int) -> None:
        """An optimizer took step `step` (1 is the first) of `num_steps`; its gradients are still there. Comes before
        `refresh`."""
        slot = self.slots[number]
        if isinstance(slot.variant, TrainingHooks):
            slot.variant.after_update({name: layer.masters for name, layer in slot.layers.items()}, step, num_steps)

    def _has_encoder(self, number: int) -> bool:
        """Its virtual tokens come from more than their table."""
        return number in self.virtual.by_slot and self.slots[number].parameters.keys() != {TABLE}

    def enable_noise(self) -> None:
        """Let the input embedding add the noise that routing asks for (NEFTune)."""
        self._wrapped(name_of(self.base.model, self.base.model.get_input_embeddings()), RoutedEmbedding)

    def _free(self, wanted: int | None = None) -> int:
        """The slot that is wanted, or the first that nobody has."""
        assert wanted not in self.slots, f"slot {wanted} is taken"
        self.times_added += 1
        if wanted is not None:
            return wanted
        return next(index for index in range(len(self.slots) + 1) if index not in self.slots)

    def _add_prompt(self, config: Any, seed: int, number: int) -> int:
        """The virtual tokens of some `PromptSettings` in a free slot."""
        encoder = self.virtual.add(number, config, self.base, _generator(seed, config.type))
        if not config.of_attention:
            name = name_of(self.base.model, self.base.model.get_input_embeddings())
            self._wrapped(name, RoutedEmbedding).virtual = self.virtual
        self.slots[number] = Slot(config, Variant(), parameters=dict(encoder.named_parameters()))
        return number

    def _add_bottleneck(self, config: Any, seed: int, number: int) -> int:
        """The adapters of some `BottleneckSettings` in a free slot."""
        parameters = self.blocks.add(number, config, self.base, partial(_generator, seed), self._trained)
        self.slots[number] = Slot(config, Variant(), parameters=parameters)
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
        problems += self._not_whole(targets)
        raise_all(ModelError, "this adapter cannot be attached", problems)

    def _not_whole(self, targets: Targets) -> list[str]:
        """What an adapter would copy or read at any time, and what is not there at all times."""
        placement, model = self.base.placement, self.base.model
        own: list[str] = []
        if placement.shares_head:
            head = name_of(model, model.get_output_embeddings())
            own = [*targets.copies, *targets.embeddings, *(name for name in targets.linears if name == head)]
        elif placement.moves_layers:
            inside = {module for layer in decoder_layers(model) or () for module in layer.modules()}
            own = [name for name in targets.copies if model.get_submodule(name) in inside]
        return [f"{name}: the device does not hold it all the time; set base: replicated" for name in own]

    def _add_experts(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        """An adapter for each expert of a fused parameter, as one pair A (R E, D), B (O, R E)."""
        path, _, key = name.rpartition(".")
        routed: RoutedExperts = self._wrapped(path, RoutedExperts)
        rank, alpha = slot.ranks[name] = rank_by(slot.config, name)
        scale = slot.variant.scale(rank, alpha)
        fresh = slot.variant.init(Expert(routed.base, key, 0), rank * routed.num_experts, scale, generator)
        masters = {key: self._master(value, trained=True) for key, value in fresh.items()}
        layer = LayerAdapter(slot.variant, scale, masters, self._copies(slot.variant, masters))
        routed.adapters.setdefault(number, {})[key] = slot.experts[name] = layer
        trained = {part: value for part, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update(
            {f"{name}.{slot.config.peft.name_in_files(part)}": value for part, value in trained.items()}
        )

    def _begin(
        self, variant: Variant, config: AdapterConfig, layers: dict[str, BaseLinear], looks: CalibrationSteps | None
    ) -> None:
        if layers and isinstance(variant, SiteSetup):
            ranks = {name: rank_by(config, name)[0] for name in layers}
            site = AdapterSite(
                layers,
                partial(original_weight, self.base),
                self.base.device,
                self._master_dtype,
                ranks,
                looks,
            )
            variant.setup(site, config.rank)

    def _add_linears(self, number: int, slot: Slot, routed: Mapping[str, RoutedLinear], seed: int) -> list[str]:
        """Attach a slot to these layers; the reasons why that cannot be."""
        problems: list[str] = []
        with self.base.placement.reading() as reading:
            for name, layer in routed.items():
                reading(name)
                problem = self._add_linear(number, slot, layer, name, _generator(seed, name))
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
        layer = LayerAdapter(variant, scale, masters, self._copies(variant, masters), slot.config.dropout)
        routed.adapters[number] = slot.layers[name] = layer
        trained = {key: value for key, value in masters.items() if isinstance(value, nn.Parameter)}
        slot.parameters.update(
            {f"{name}.{slot.config.peft.name_in_files(key)}": value for key, value in trained.items()}
        )
        return None

    def _add_embedding(self, number: int, slot: Slot, name: str, generator: torch.Generator) -> None:
        routed = self._wrapped(name, RoutedEmbedding)
        rank, alpha = slot.ranks[name] = rank_by(slot.config, name)
        fresh = fresh_embedding_adapter(routed.num_embeddings, routed.embedding_dim, rank, generator)
        masters = {key: nn.Parameter(value.to(self.base.device, self._master_dtype)) for key, value in fresh.items()}
        routed.adapters[number] = (slot.variant.scale(rank, alpha), {**masters})
        slot.parameters.update({f"{name}.{key}": value for key, value in masters.items()})

    @property
    def _master_dtype(self) -> torch.dtype:
        return float32_or_wider(self.base.dtype)

    def _add_token_rows(self, number: int, slot: Slot) -> None:
        """Rows of the slot's own in the embedding, and in the head, where that is another tensor."""
        ids = token_ids(self.base, slot.config.trainable_token_indices)
        token_N = torch.tensor(ids, device=self.base.device)
        model = self.base.model
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name, head_name = name_of(model, embedding), name_of(model, head)
        start_ND = head.weight.detach()[token_N].to(self._master_dtype)
        row_ND = own_ND = nn.Parameter(embedding.weight.detach()[token_N].to(self._master_dtype))
        slot.parameters[f"{name}.{TOKEN_ROWS}"] = row_ND
        if innermost(head).weight is not innermost(embedding).weight:
            own_ND = slot.parameters[f"{head_name}.{TOKEN_ROWS}"] = nn.Parameter(start_ND.clone())
        vocabulary = len(embedding.weight)
        self._wrapped(name, RoutedEmbedding).rows[number] = token_rows(row_ND, token_N, vocabulary)
        masters = head_tensors(own_ND, start_ND, token_N, vocabulary)
        self._wrapped(head_name, RoutedLinear).adapters[number] = LayerAdapter(HeadRows(), 1.0, masters)

    def _master(self, value: torch.Tensor, trained: bool) -> torch.Tensor:
        return self._trained(value) if trained else value.to(self.base.device, self._master_dtype)

    def _trained(self, value: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(value.to(self.base.device, self._master_dtype))

    def _copies(self, variant: Variant, masters: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A and B in the compute dtype, if that is not the masters' and their layers share none."""
        low_rank = variant.as_low_rank(masters)
        if low_rank is None or self._master_dtype == self.base.dtype or shared_tensors(variant):
            return None
        A_RD, B_OR = (tensor.detach().to(self.base.dtype) for tensor in low_rank)
        return A_RD, B_OR

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


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(key_of(seed, name))
