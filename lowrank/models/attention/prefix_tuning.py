"""Prefix tuning: a stream of documents some of whose keys and values are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.models.attention.packed import Attending, Packed, Softmax, attend_documents

StandIn = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(attention layer, (1, G, T, d) keys as they are attended to, (1, G, T, d) values) -> the same with others in
the place of some rows'. It changes nothing in place."""


@dataclass(frozen=True)
class Prefixed:
    """In the place of the stream itself, be it whole documents or ones that go on from a cache.

    What stands in is what the cache keeps, so later tokens see it too.
    """

    stream: Packed | Attending
    stand_in: StandIn

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """As the stream does: -> (1, T, H, d)."""
        key, value = self.stand_in(module, key, value)
        if isinstance(self.stream, Packed):
            return attend_documents(query, key, value, how, self.stream)
        return self.stream.attend(module, query, key, value, how)
