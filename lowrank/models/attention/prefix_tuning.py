"""Prefix tuning: attention over a stream of documents in which some keys and values are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lowrank.models.attention.packed import AttentionStream, Packed, Softmax, attend_documents

KVInjection = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(attention layer, (1, G, T, d) keys as they are attended to, (1, G, T, d) values) -> keys and values with some rows
replaced. It changes nothing in place."""


@dataclass(frozen=True)
class WithInjectedKV:
    """A stream, of whole documents or of ones that go on from a cache, after `inject_kv`.

    The cache keeps the injected keys and values, so later tokens see them too.
    """

    stream: Packed | AttentionStream
    inject_kv: KVInjection

    def attend(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, how: Softmax
    ) -> torch.Tensor:
        """As the stream does: -> (1, T, H, d)."""
        key, value = self.inject_kv(module, key, value)
        if isinstance(self.stream, Packed):
            return attend_documents(query, key, value, how, self.stream)
        return self.stream.attend(module, query, key, value, how)
