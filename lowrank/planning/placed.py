"""What a device holds of the base, and what comes to it and goes during a step, where weights are moved.

    replicated       all of it
    sharded          a part; a layer at a time is gathered, and the next one while it computes
    sharded_offload  nothing between steps; the part waits in host memory
    streamed         embedding, head and the rest; layers come from host memory

Gathering takes what is gathered twice: the bytes of all devices, and the tensors they are copied into. In a forward
pass FSDP2 holds those of the layer before until they are there. Counted on one rank of eight, on tensors with values
(tests/planning/test_placed.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lowrank.planning.base_bytes import BaseBytes
from lowrank.planning.peaks import StepTrace

REPLICATED, SHARDED, OFFLOADED, STREAMED = "replicated", "sharded", "sharded_offload", "streamed"
_COMPUTING, _GATHERING = 2, 3
"""Times the bytes of a layer, while it computes, and while it is gathered in a forward pass."""


@dataclass(frozen=True)
class Placed:
    """How the base of a run is kept: `base` of the settings, by `devices` of which `shard_size` hold it once."""

    base: str = REPLICATED
    devices: int = 1
    shard_size: int = 1

    @property
    def shards(self) -> bool:
        """Devices have parts of it."""
        return self.base in (SHARDED, OFFLOADED) and self.shard_size > 1

    def on_device(self, parts: BaseBytes) -> int:
        """Bytes that a device holds between steps."""
        if self.base == STREAMED:
            return parts.total - sum(parts.layers)
        if not self.shards:
            return parts.total
        return parts.rest if self.base == OFFLOADED else parts.rest + _share(parts, self.shard_size)

    def on_host(self, parts: BaseBytes) -> int:
        """Bytes of a machine's pinned host memory, for all of its devices."""
        if self.base == STREAMED:  # one copy for all processes of a machine
            return sum(parts.layers)
        return parts.total - parts.rest if self.shards and self.base == OFFLOADED else 0

    def moved(self, trace: StepTrace, parts: BaseBytes) -> StepTrace:
        """A step of the base as it is kept, from that of a whole one."""
        if self.base == REPLICATED or (self.base != STREAMED and not self.shards):
            return trace
        layer, head = parts.largest_layer, (parts.head or parts.embedding) if self.shards else 0
        gathering = (_GATHERING if self.shards else _COMPUTING) * layer
        return dataclasses.replace(
            trace,
            base=trace.base - parts.total + self.on_device(parts),
            forward=max(trace.forward + _COMPUTING * layer, trace.kept + gathering, 2 * head),
            loss=max(trace.loss + head, trace.kept + 2 * head),
            backward=trace.backward + _COMPUTING * layer,
        )

    def sent_for_base(self, parts: BaseBytes, passes: int) -> int:
        """Bytes that reach a device in a step of so many forward and backward passes: layers twice, embedding and head
        once a pass."""
        if self.base == STREAMED:
            return passes * 2 * sum(parts.layers)
        if not self.shards:
            return 0
        gathered = 2 * sum(parts.layers) + parts.embedding + (parts.head or parts.embedding)
        own = 0 if self.base == OFFLOADED else gathered // self.shard_size
        return passes * (gathered - own)

    def sent_for_gradients(self, gradients: int) -> int:
        """Bytes that leave a device once a step: chunks to whoever adds them, and the sums to all."""
        return int(2 * gradients * (self.devices - 1) / self.devices)


def _share(parts: BaseBytes, shard_size: int) -> int:
    return -(-(parts.total - parts.rest) // shard_size)
