"""Soft prompts: the rows of a batch that are virtual tokens, and the learned embeddings or keys and values for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from lowrank.adapters.prompts import KeyShape, PromptSettings, PromptSite
from lowrank.adapters.routing import ForwardContext, Routing, VirtualTokenRows
from lowrank.batches import BASE_SLOT, Batch, pack
from lowrank.devices import to_device
from lowrank.errors import ModelError
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.base import Base
from lowrank.models.layers import decoder_layers
from lowrank.segments import Segment


@dataclass(frozen=True)
class SoftPrompt:
    """One slot's virtual tokens. `keys`: None where its table stands in for embeddings."""

    encoder: nn.Module
    num_tokens: int
    keys: KeyShape | None = None


class VirtualTokens:
    """The prompts of a bank. What they give is computed once per forward pass, however many layers ask."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.by_slot: dict[int, SoftPrompt] = {}
        self._keys: KeyShape | None = None
        self._layers: dict[nn.Module, int] = {}
        """The place of each layer that attends."""
        self._runs: tuple[VirtualTokenRows, ...] | None = None
        self._tables: dict[int, torch.Tensor] = {}
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, number: int, config: PromptSettings, base: Base, generator: torch.Generator) -> nn.Module:
        """A slot's virtual tokens on `base`; what gives their table, and is trained. ModelError if they do not fit."""
        kind = getattr(config, "type", "prompt")
        if base.layout != "packed":
            raise ModelError(
                f"adapter.type {kind} needs model.attention: packed, and {base.name} runs padded; use lora"
            )
        site = self._site(base)
        keys = site.keys() if config.of_attention else None
        try:
            encoder = config.encoder(site, generator)
        except ValueError as error:
            raise ModelError(f"adapter.type {kind}: {error}") from error
        for module in encoder.modules():  # not `.to`, which fake tensors of a plan do not know
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().to(base.device, float32_or_wider(base.dtype))))
        if config.of_attention:
            base.inject_kv = self.inject_prefix_kv
        self.by_slot[number] = SoftPrompt(encoder, config.num_virtual_tokens, keys)
        return encoder

    def _site(self, base: Base) -> PromptSite:
        embedding = base.model.get_input_embeddings()
        weight: torch.Tensor = embedding.weight

        @torch.no_grad()
        def embed(token_N: torch.Tensor) -> torch.Tensor:
            with self.routing.using(ForwardContext()):
                return embedding(token_N.to(base.device)).to(float32_or_wider(base.dtype))

        return PromptSite(
            hidden_size=weight.shape[1],
            vocabulary=weight.shape[0],
            embed=embed,
            tokens_of=lambda text: base.tokenizer(text)["input_ids"] if base.tokenizer is not None else [0],
            keys=partial(self.key_shape, base),
        )

    def embed(self, embedded_ND: torch.Tensor) -> torch.Tensor:
        """The same with prompts in their rows."""
        for slot in self._present(of_attention=False):
            row_N, place_N = self._rows_of(slot, embedded_ND.device)
            own_ND = self._table(slot).to(embedded_ND.dtype)[place_N]
            embedded_ND = embedded_ND.index_copy(0, row_N, own_ND)
        return embedded_ND

    def inject_prefix_kv(
        self, module: nn.Module, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same with prefixes in their rows (models/attention/prefix_tuning.py)."""
        for slot in self._present(of_attention=True):
            keys = self.by_slot[slot].keys
            assert keys is not None
            row_N, place_N = self._rows_of(slot, key.device)
            table = self._table(slot).view(-1, keys.layers, 2, keys.heads, keys.width)
            own_NkGd = table[place_N, self._layers[module]].to(key.dtype)
            key = key.index_copy(2, row_N, own_NkGd[:, 0].transpose(0, 1)[None])
            value = value.index_copy(2, row_N, own_NkGd[:, 1].transpose(0, 1)[None])
        return key, value

    def _present(self, of_attention: bool) -> list[int]:
        if self._runs is not self.routing.current.virtual:
            self._runs, self._tables, self._rows = self.routing.current.virtual, {}, {}
        slots = dict.fromkeys(run.slot for run in self._runs or ())
        return [slot for slot in slots if (self.by_slot[slot].keys is not None) == of_attention]

    def _table(self, slot: int) -> torch.Tensor:
        if slot not in self._tables or (torch.is_grad_enabled() and not self._tables[slot].requires_grad):
            self._tables[slot] = self.by_slot[slot].encoder()
        return self._tables[slot]

    def _rows_of(self, slot: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows of the batch, virtual token that lies there)."""
        if slot not in self._rows:
            own = [run for run in self.routing.current.virtual if run.slot == slot]
            rows = [row for run in own for row in range(run.row, run.row + run.number)]
            places = [place for run in own for place in range(run.place, run.place + run.number)]
            self._rows[slot] = (to_device(torch.tensor(rows), device), to_device(torch.tensor(places), device))
        return self._rows[slot]

    def key_shape(self, base: Base) -> KeyShape:
        """What every layer attends to, found out by running the model on two tokens. ModelError where layers differ."""
        if self._keys is not None:
            return self._keys
        shapes: dict[nn.Module, tuple[int, ...]] = {}

        def record_shape(
            module: nn.Module, key: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            shapes[module] = (key.shape[1], key.shape[3], value.shape[1], value.shape[3])
            return key, value

        before, base.inject_kv = base.inject_kv, record_shape
        segment = Segment(np.zeros(2, np.int64), np.zeros(2, np.float32))
        try:
            with torch.no_grad(), self.routing.using(ForwardContext()):
                base.hidden(pack([(BASE_SLOT, segment)]).to(base.device))
        finally:
            base.inject_kv = before
        layers, kinds = decoder_layers(base.model), set(shapes.values())
        heads, width, *of_values = shapes[next(iter(shapes))] if shapes else (0, 0)
        if len(kinds) != 1 or [heads, width] != of_values or (layers is not None and len(layers) != len(shapes)):
            raise ModelError(
                f"adapter.type prefix_tuning: the layers of {base.name} do not all attend to keys and values of one "
                "shape, which a prefix needs; use prompt_tuning"
            )
        self._layers = {module: place for place, module in enumerate(shapes)}
        self._keys = KeyShape(len(shapes), heads, width)
        return self._keys


def runs_of(batch: Batch) -> tuple[VirtualTokenRows, ...]:
    """Where a packed batch has virtual tokens."""
    return virtual_token_rows(list(zip(batch.slots, batch.virtual, batch.prefixes, batch.lengths)))


def virtual_token_rows(chunks: Sequence[tuple[int, int, int, int]]) -> tuple[VirtualTokenRows, ...]:
    """The same for `(slot, virtual tokens of its sequence, tokens read before, tokens read now)` in a row."""
    runs, row = [], 0
    for slot, number, past, length in chunks:
        if past < number:
            runs.append(VirtualTokenRows(slot, row, past, min(number - past, length)))
        row += length
    return tuple(runs)
