"""Single tokens trained per slot: rows of its own in the embedding and in the head (PEFT's `trainable_token_indices`).

This is for new tokens: only their rows are trained, all others stay the base's. In the head a slot's rows are a
low-rank update: (rows - the base's rows) after a matrix that has a 1 where a token is. So every head that applies LoRA
applies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.errors import ModelError, raise_all
from lowrank.models.base import Base

NAME = "token_adapter.trainable_tokens_delta"
"""The end of the tensor's name in files. PEFT calls it a delta; it holds the rows themselves."""


@dataclass(frozen=True)
class TokenRows:
    """One slot's own rows (N, D) of an embedding, and where in it they are: `place_V` is their number, or -1."""

    row_ND: nn.Parameter
    place_V: torch.Tensor

    def instead(self, token_N: torch.Tensor, embedded_ND: torch.Tensor, scale: Any) -> torch.Tensor:
        """The embeddings of tokens, with the slot's own where it has them."""
        place_N = self.place_V[token_N]
        own_ND = (self.row_ND[place_N.clamp(min=0)] * scale).to(embedded_ND.dtype)
        return torch.where((place_N >= 0)[:, None], own_ND, embedded_ND)


class HeadRows(Variant):
    """`rows` (N, D) in the place of `start` (N, D) at the tokens of `place` (V, N)."""

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows - start, place)."""
        return tensors["rows"] - tensors["start"], tensors["place"]


def token_ids(base: Base, items: Sequence[int | str]) -> tuple[int, ...]:
    """The ids of `trainable_token_indices`; ModelError lists those that are no tokens. A base without a tokenizer,
    as plans have it, takes any row for a token that is written out."""
    rows, ids, problems = len(base.model.get_input_embeddings().weight), [], []
    known = dict(zip(items, range(len(items)))) if base.tokenizer is None else base.tokenizer.get_vocab()
    for item in items:
        number = known.get(item) if isinstance(item, str) else item
        if number is None:
            problems.append(f"{item!r} is not in the vocabulary; `lowrank vocab` adds it")
        elif not 0 <= number < rows:
            problems.append(f"{item!r}: the embedding has {rows} rows; `lowrank vocab` makes it larger")
        else:
            ids.append(number)
    raise_all(ModelError, "adapter.trainable_token_indices", problems)
    return tuple(dict.fromkeys(ids))


def token_rows(row_ND: nn.Parameter, token_N: torch.Tensor, vocabulary: int) -> TokenRows:
    """`row_ND` at the tokens `token_N`."""
    place_V = torch.full((vocabulary,), -1, device=token_N.device)
    place_V[token_N] = torch.arange(len(token_N), device=token_N.device)
    return TokenRows(row_ND, place_V)


def head_tensors(row_ND: nn.Parameter, start_ND: torch.Tensor, token_N: torch.Tensor, vocabulary: int) -> Tensors:
    """What `HeadRows` computes with."""
    place_VN = start_ND.new_zeros(vocabulary, len(token_N))
    place_VN[token_N, torch.arange(len(token_N), device=token_N.device)] = 1.0
    return {"rows": row_ND, "start": start_ND, "place": place_VN}
