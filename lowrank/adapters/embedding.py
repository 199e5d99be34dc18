"""Routed modules other than linear layers: embeddings (adapters, NEFTune noise) and trained copies of whole modules."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from lowrank.adapters.routing import Routing
from lowrank.adapters.soft_prompts import VirtualTokens
from lowrank.adapters.targets import innermost
from lowrank.adapters.token_rows import TokenRows
from lowrank.adapters.variants.base import Tensors
from lowrank.kernels.counter_random import uniform
from lowrank.kernels.precision import float32_or_wider


class _Routed(nn.Module):
    """A frozen module of the model and the way its rows go."""

    is_routed = True

    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.routing = routing

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight."""
        weight = self.base.weight
        assert isinstance(weight, torch.Tensor)
        return weight


class RoutedEmbedding(_Routed):
    """A lookup table; a slot may have rows of its own, add `scale * B A[:, token]` (PEFT's lora_embedding_A/B) and
    noise, and put vectors in the place of its virtual tokens."""

    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__(base, name, routing)
        self.adapters: dict[int, tuple[float, Tensors]] = {}
        self.rows: dict[int, TokenRows] = {}
        self.virtual: VirtualTokens | None = None
        self.num_embeddings: int = self.weight.shape[0]
        self.embedding_dim: int = self.weight.shape[1]

    @property
    def embed_scale(self) -> float | torch.Tensor:
        """What the family multiplies its embeddings with (Gemma); an adapter's part is multiplied too, as in PEFT."""
        return getattr(innermost(self), "embed_scale", 1.0)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        embedded_ND = self.base(token).reshape(-1, self.embedding_dim)
        token_N = token.reshape(-1)
        for slot, first, end in self.routing.current.in_rows_of(len(token_N), self.name):
            rows = slice(first, end)
            if slot in self.rows:
                own = self.rows[slot].instead(token_N[rows], embedded_ND[rows], self.embed_scale)
                embedded_ND = torch.cat([embedded_ND[:first], own, embedded_ND[end:]])
            extra = None
            if slot in self.adapters:
                scale, tensors = self.adapters[slot]
                A_NR = F.embedding(token_N[rows], tensors["lora_embedding_A"].t())
                extra = (A_NR @ tensors["lora_embedding_B"].t()) * (scale * self.embed_scale)
            noise = self._noise(slot, rows)
            for part in (extra, noise):
                if part is not None:
                    changed = embedded_ND[rows] + part.to(embedded_ND.dtype)
                    embedded_ND = torch.cat([embedded_ND[:first], changed, embedded_ND[end:]])
        if self.virtual is not None:
            embedded_ND = self.virtual.embed(embedded_ND)
        return embedded_ND.view(*token.shape, self.embedding_dim)

    def _noise(self, slot: int, rows: slice) -> torch.Tensor | None:
        """NEFTune (arXiv:2310.05914): uniform in +-alpha / sqrt(L D). L is the sequence's length."""
        rng_key, counter_N = self.routing.current.rng_keys.get(slot), self.routing.current.counter_N
        if rng_key is None or not rng_key.neftune_alpha or counter_N is None:
            return None
        key = self.routing.current.key(slot, "neftune")
        assert key is not None
        assert self.routing.current.length_N is not None
        size_N1 = rng_key.neftune_alpha / (self.routing.current.length_N[rows, None] * self.embedding_dim).sqrt()
        return uniform(counter_N[rows], self.embedding_dim, key) * size_N1


class RoutedCopy(_Routed):
    """A module that some slots have as their own, trained copy (`modules_to_save`). It must work row by row."""

    def __init__(self, base: nn.Module, name: str, routing: Routing) -> None:
        super().__init__(base, name, routing)
        self.copies: dict[int, nn.Module] = {}

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's, which is not trained; None where it has none (an embedding)."""
        return getattr(self.base, "bias", None)

    def add(self, slot: int) -> dict[str, nn.Parameter]:
        """A float32 copy for `slot`, kept out of the model's own parameters."""
        duplicate = _wide_copy(self.base)
        self.copies = {**self.copies, slot: duplicate}
        return dict(duplicate.named_parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not any(slot in self.copies for slot, _, _ in self.routing.current.ranges):
            return self.base(x)
        if self._heads_first(x):
            return self._by_rows(x.transpose(1, 2)).transpose(1, 2)
        return self._by_rows(x)

    def _heads_first(self, x: torch.Tensor) -> bool:
        """Whether `x` is (B, H, L, d), as norms of queries and keys see it in some families, and not (B, L, H, d)."""
        num_rows = self.routing.current.num_rows
        if x.ndim != 4 or x.shape[0] == num_rows:
            return False
        if x.shape[1] == x.shape[2]:
            return x.stride(1) < x.stride(2)
        return x.shape[0] * x.shape[1] != num_rows and x.shape[0] * x.shape[2] == num_rows

    def _by_rows(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        pieces, done = [], 0
        for slot, first, end in self.routing.current.in_rows_of(len(rows), self.name):
            if slot in self.copies:
                pieces += [self.base(rows[done:first]), self._own(slot, rows[first:end])]
                done = end
        y = torch.cat([*pieces, self.base(rows[done:])])
        return y.view(*(x.shape[:-1] if x.is_floating_point() else x.shape), y.shape[-1])

    def _own(self, slot: int, rows: torch.Tensor) -> torch.Tensor:
        module = self.copies[slot]
        cast = {name: parameter.to(self.weight.dtype) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, cast, (rows,))


def _wide_copy(module: nn.Module) -> nn.Module:
    """A copy to train, float32 or wider, with parameters made here.

    They are handed to deepcopy, since `deepcopy(module).to(dtype)` is no way: on the fake tensors of the planner torch
    exchanges each parameter for its conversion, fails half way and corrupts the process's memory.
    """
    with torch.no_grad():
        memo: dict[int, object] = {
            id(parameter): nn.Parameter(parameter.detach().to(float32_or_wider(parameter.dtype), copy=True))
            for parameter in module.parameters()
        }
        memo |= {id(buffer): buffer.clone() for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def fresh_embedding_adapter(num_embeddings: int, width: int, rank: int, generator: torch.Generator) -> Tensors:
    """As in PEFT: A (R, V) zero, B (D, R) standard normal."""
    return {
        "lora_embedding_A": torch.zeros(rank, num_embeddings),
        "lora_embedding_B": torch.randn(width, rank, generator=generator),
    }
