"""The bank: N adapters on one frozen base, each in its slot. N is 1 for a plain fine-tune; there is no other case.

The bank wraps a layer when the first adapter asks for it (injection.py) and owns every trainable tensor: float32
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
from lowrank.adapters.embedding import RoutedCopy, RoutedEmbedding
from lowrank.adapters.injection import Injector, generator_of
from lowrank.adapters.linear import RoutedLinear
from lowrank.adapters.prompts import TABLE, PromptSettings
from lowrank.adapters.routing import ForwardContext, RngKey, Routing
from lowrank.adapters.slot import SavedAdapter, Slot, load_tensors, saved_form
from lowrank.adapters.soft_prompts import VirtualTokens, runs_of
from lowrank.adapters.targets import Targets, find_targets, name_of
from lowrank.adapters.token_rows import token_ids
from lowrank.adapters.validation import target_problems
from lowrank.adapters.variants import AdapterConfig
from lowrank.adapters.variants.base import TrainingHooks, Variant, reads_all_from_files
from lowrank.batches import BASE_SLOT, Batch
from lowrank.errors import ModelError, raise_all
from lowrank.kernels.logprobs import Head
from lowrank.models.base import Base
from lowrank.models.layer_wrappers import refuse_wrapped
from lowrank.models.layers import decoder_layers
from lowrank.segments import Segment, with_virtual_tokens

_STATE = "variant "
"""How names of a variant's own state begin."""


class Bank:
    """Adapters by slot number on one base."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.routing = Routing()
        self._injector = Injector(base, self.routing)
        self.virtual = VirtualTokens(self.routing)
        self.blocks = AdaptedBlocks(self.routing)
        self.slots: dict[int, Slot] = {}
        self.times_added = 0
        """Adapters that have come so far; another one may have wrapped more layers, in a slot that had one before."""

    def add(
        self, config: AdapterConfig, *, seed: int, calibration: CalibrationSteps | None = None, slot: int | None = None
    ) -> int:
        """A fresh adapter in the first free slot, or in `slot`, where a run goes on. Its start depends on `seed` and
        the layer's name, and where the variant asks for it on the job's data (`calibration`)."""
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
        own = Slot(
            config,
            config.build(),
            copies=targets.copies,
            unmatched_note=targets.unmatched_note,
            adapts_tower=targets.adapts_tower,
        )
        self._injector.inject(number, own, targets, seed, calibration)
        self.slots[number] = own
        return number

    def remove(self, number: int) -> None:
        """Free a slot and the memory of its tensors; the layers stay wrapped."""
        del self.slots[number]
        self.virtual.by_slot.pop(number, None)
        self.blocks.remove(number)
        self._injector.remove(number)

    def parameters(self, number: int) -> dict[str, nn.Parameter]:
        """The trainable tensors of a slot, by PEFT's names."""
        return self.slots[number].parameters

    def learning_rate_factors(self, number: int, learning_rate: float) -> list[float]:
        """What the learning rate of each of a slot's parameters is multiplied by (LoRA+), in their order."""
        slot = self.slots[number]
        return [slot.config.learning_rate_factor(*item, learning_rate) for item in slot.parameters.items()]

    def with_virtual_tokens(self, slot: int, segment: Segment) -> Segment:
        """The segment as a slot reads it: behind the slot's virtual tokens, where it has some."""
        return with_virtual_tokens(segment, self.num_virtual(slot))

    def num_virtual(self, slot: int) -> int:
        """Virtual tokens before each of a slot's documents."""
        prompt = self.virtual.by_slot.get(slot)
        return prompt.num_tokens if prompt else 0

    def max_positions(self, slot: int) -> int | None:
        """Tokens of the longest document a slot reads; None where the base does not say."""
        return None if self.base.max_positions is None else self.base.max_positions - self.num_virtual(slot)

    def hidden(self, batch: Batch, rng_keys: Mapping[int, RngKey] | None = None) -> torch.Tensor:
        """The last hidden states, (T, D), each segment through its own slot. `batch`: of `with_virtual_tokens`
        segments, on the base's device; `rng_keys`: in training, where random numbers come from."""
        if self.base.layout_of(batch) != self.base.layout and any(map(self.num_virtual, batch.slots)):
            raise ModelError(
                f"{self.base.name}: an adapter of virtual tokens cannot be shown media here: its rows are padded"
            )
        with self.routing.using(self.context(batch, rng_keys)):
            return self.base.hidden(batch, training=rng_keys is not None)

    def context(self, batch: Batch, rng_keys: Mapping[int, RngKey] | None = None) -> ForwardContext:
        """What the layers know about the rows of `batch` in a pass of it; arguments as of `hidden`."""
        rows = self.base.rows(batch)
        return ForwardContext(rows.num_rows, rows.ranges, rows.counter_N, rows.length_N, rng_keys or {}, runs_of(batch))

    @contextlib.contextmanager
    def tower_pass(self, slot: int, origin_1: torch.Tensor) -> Generator[None, None, None]:
        """The pass of the tower over the pictures of one document of a slot: all of its rows are that slot's. With a
        graph where the slot trains something there. `origin_1`: `Segment.origin` of the document, (1)."""
        trained = torch.is_grad_enabled() and slot in self.slots and self.slots[slot].adapts_tower
        rng_keys = self.routing.current.rng_keys
        context = ForwardContext(1, ((slot, 0, 1),), origin_1, rng_keys={} if slot == BASE_SLOT else rng_keys)
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
        weights, masters = [], []
        with self.base.placement.reading() as reading:
            for name, layer in self.slots[number].layers.items():
                variant = layer.variant
                if isinstance(variant, TrainingHooks) and type(variant).refresh is not TrainingHooks.refresh:
                    reading(name)
                    base = self.base.model.get_submodule(name).base
                    variant.refresh(base, layer.scale, layer.masters)
        for layer in (*self.slots[number].layers.values(), *self.slots[number].experts.values()):
            if layer.compute_dtype_weights is not None:
                weights += layer.compute_dtype_weights
                masters += layer.variant.as_low_rank(layer.masters) or ()
        if weights:
            torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]

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
        self._injector.wrapped(name_of(self.base.model, self.base.model.get_input_embeddings()), RoutedEmbedding)

    def _free(self, wanted: int | None = None) -> int:
        """The slot that is wanted, or the first that nobody has."""
        assert wanted not in self.slots, f"slot {wanted} is taken"
        self.times_added += 1
        if wanted is not None:
            return wanted
        return next(index for index in range(len(self.slots) + 1) if index not in self.slots)

    def _add_prompt(self, config: Any, seed: int, number: int) -> int:
        """The virtual tokens of some `PromptSettings` in a free slot."""
        encoder = self.virtual.add(number, config, self.base, generator_of(seed, config.type))
        if not config.of_attention:
            name = name_of(self.base.model, self.base.model.get_input_embeddings())
            self._injector.wrapped(name, RoutedEmbedding).virtual = self.virtual
        self.slots[number] = Slot(config, Variant(), parameters=dict(encoder.named_parameters()))
        return number

    def _add_bottleneck(self, config: Any, seed: int, number: int) -> int:
        """The adapters of some `BottleneckSettings` in a free slot."""
        parameters = self.blocks.add(number, config, self.base, partial(generator_of, seed), self._injector.trained)
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
        problems = target_problems(self.base.model, config, targets, copied, adapted)
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
