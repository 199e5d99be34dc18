"""Where the attention and the MLP of a decoder layer end, and what slots have there (bottleneck.py).

Nothing is replaced: hooks of torch listen at the two blocks of each layer, in whatever the layer is made of, and hand
each slot its own rows. The blocks are found by running the model once on two tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lowrank.adapters.bottleneck import Bottleneck, BottleneckSettings, fresh
from lowrank.adapters.routing import ForwardContext, Routing
from lowrank.adapters.targets import innermost, is_linear, name_of
from lowrank.batches import BASE_SLOT, pack
from lowrank.errors import ModelError
from lowrank.kernels.counter_random import dropout
from lowrank.models.base import Base
from lowrank.models.fused_experts import fused_shapes
from lowrank.models.layers import decoder_layers
from lowrank.segments import Segment

KINDS = ("attention_adapters", "output_adapters")
"""AdapterHub's names of the two places in a layer."""


@dataclass
class Block:
    """One place: behind `module`, whose input comes from `source` (a norm, or the module itself)."""

    name: str
    """`model.layers.0.output_adapters`."""
    layer: int
    kind: str
    hidden_size: int
    module: nn.Module
    source: nn.Module
    routing: Routing
    adapters: dict[int, Bottleneck] = field(default_factory=dict)
    _stream: torch.Tensor | None = None
    """What the source was given in this call of the layer."""

    def listen(self) -> None:
        """From now on each call of the block passes here."""
        self.source.register_forward_pre_hook(self._remember, with_kwargs=True)
        self.module.register_forward_hook(self._adapt)

    def _remember(self, module: nn.Module, args: Any, options: Any) -> None:
        del module
        if any(adapter.config.reads_stream for adapter in self.adapters.values()):
            self._stream = _first_tensor(args, options)

    def _adapt(self, module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        stream, self._stream = self._stream, None
        if not any(slot in self.adapters for slot, _, _ in self.routing.current.ranges):
            return None
        if isinstance(output, torch.Tensor):
            return self._by_slots(output, stream)
        return (self._by_slots(output[0], stream), *output[1:])

    def _by_slots(self, h: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
        h_TD = h.reshape(-1, h.shape[-1])
        stream_TD = None if stream is None else stream.reshape(h_TD.shape)
        pieces, done = [], 0
        for slot, first, end in self.routing.current.in_rows_of(len(h_TD), self.name):
            adapter = self.adapters.get(slot)
            if adapter is None:
                continue
            own_TD = None if stream_TD is None else stream_TD[first:end]
            pieces += [h_TD[done:first], adapter(h_TD[first:end], own_TD, self._drop(slot, adapter, first, end))]
            done = end
        return torch.cat([*pieces, h_TD[done:]]).view(h.shape)

    def _drop(self, slot: int, adapter: Bottleneck, first: int, end: int) -> Any:
        rate = adapter.config.dropout
        key = self.routing.current.key(slot, self.name) if rate else None
        if key is None:
            return None
        assert self.routing.current.counter_N is not None
        return partial(dropout, counter_T=self.routing.current.counter_N[first:end], key=key, probability=rate)


class AdaptedBlocks:
    """All blocks of a bank's base, looked for when the first slot asks."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.found: list[Block] = []

    def add(
        self,
        number: int,
        config: BottleneckSettings,
        base: Base,
        generator_of: Callable[[str], torch.Generator],
        master: Callable[[torch.Tensor], nn.Parameter],
    ) -> dict[str, nn.Parameter]:
        """Put a slot's adapters in their places; what is trained, by name. ModelError if they do not fit the base."""
        if not self.found:
            self.found = find_blocks(base, self.routing)
            for block in self.found:
                block.listen()
        wanted = [block for block in self.found if _is_wanted(block, config)]
        if not wanted:
            raise ModelError(f"adapter.leave_out leaves no layer of {base.name}")
        trained: dict[str, nn.Parameter] = {}
        for block in wanted:
            try:
                tensors = fresh(config, block.layer, block.hidden_size, generator_of(block.name))
            except ValueError as error:
                raise ModelError(f"adapter.type {getattr(config, 'type', 'bottleneck')}: {error}") from error
            masters = {name: master(value) for name, value in tensors.items()}
            block.adapters[number] = Bottleneck(config, masters)
            trained |= {f"{block.name}.{name}": value for name, value in masters.items()}
        return trained

    def remove(self, number: int) -> None:
        """Free what a slot has."""
        for block in self.found:
            block.adapters.pop(number, None)


def _is_wanted(block: Block, config: BottleneckSettings) -> bool:
    wanted = config.mh_adapter if block.kind == KINDS[0] else config.output_adapter
    return wanted and block.layer not in config.leave_out


def find_blocks(base: Base, routing: Routing) -> list[Block]:
    """The two blocks of every decoder layer, in the model's order. ModelError for layers that are made otherwise."""
    layers = decoder_layers(base.model)
    if layers is None:
        raise ModelError(f"{base.name} has no one stack of decoder layers, which bottleneck adapters need; use lora")
    seen = _watch(base, routing, layers)
    blocks = []
    for number, layer in enumerate(layers):
        name, calls = name_of(base.model, layer), seen[number]
        own = [call for call in calls if _has_weights(call.module)]
        if len(own) != len(KINDS) or any(call.num_streams > 1 for call in own):
            made_of = ", ".join(call.name for call in own) or "nothing that was seen"
            why = "add the stream around them themselves" if len(own) == len(KINDS) else "are no attention and MLP"
            raise ModelError(
                f"bottleneck adapters go behind the attention and the MLP of a layer, and the parts of {name} "
                f"({made_of}) {why}; use lora"
            )
        for kind, call in zip(KINDS, own):
            source = next((other for other in calls if other.output is call.input), call)
            width = call.input.shape[-1]
            blocks.append(Block(f"{name}.{kind}", number, kind, width, call.module, source.module, routing))
    return blocks


@dataclass(frozen=True)
class _Call:
    """A call of one of a layer's parts."""

    name: str
    module: nn.Module
    input: torch.Tensor
    output: Any
    num_streams: int
    """Arguments that look like hidden states."""


def _watch(base: Base, routing: Routing, layers: nn.ModuleList) -> dict[int, list[_Call]]:
    """What the parts of each layer are called with, on two tokens."""
    seen: dict[int, list[_Call]] = {number: [] for number in range(len(layers))}
    hooks = []

    def record_call(number: int, name: str, module: nn.Module, args: Any, options: Any, output: Any) -> None:
        given = _first_tensor(args, options)
        if given is not None:
            others = [each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)]
            streams = sum(each.shape == given.shape and each.is_floating_point() for each in others)
            output = output if isinstance(output, torch.Tensor) else output[0]
            seen[number].append(_Call(name, module, given, output, streams))

    for number, layer in enumerate(layers):
        for name, module in layer.named_children():
            hooks.append(module.register_forward_hook(partial(record_call, number, name), with_kwargs=True))
    segment = Segment(np.zeros(2, np.int64), np.zeros(2, np.float32))
    try:
        with torch.no_grad(), routing.using(ForwardContext()):
            base.hidden(pack([(BASE_SLOT, segment)]).to(base.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first_tensor(args: Any, options: Any) -> Any:
    return next((each for each in (*args, *options.values()) if isinstance(each, torch.Tensor)), None)


def _has_weights(module: nn.Module) -> bool:
    """A block, and no norm: it has linear layers, or fused experts."""
    return any(is_linear(each) or fused_shapes(innermost(each)) for each in module.modules())
