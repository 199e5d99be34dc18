"""Prefix tuning: trained keys and values before every document, at every layer (arXiv:2101.00190).

The virtual tokens go through the model like any others, and where a layer attends, its trained keys (after the rotary
embedding, as in PEFT) and values stand in for what they computed. So words stand at positions K, K + 1, ..., as behind
PEFT's past keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn
from typing_extensions import Self

from lowrank.adapters.peft_kind import PeftKind
from lowrank.adapters.prompts import PromptSettings, PromptSite, Table, draw, prompt_kind
from lowrank.settings import Positive


class PrefixTuningConfig(PromptSettings):
    """Prefix tuning: like prompt tuning, with vectors of their own for every layer."""

    paper: ClassVar[str] = "arXiv:2101.00190"
    when: ClassVar[str] = "prompt tuning that can say more: 2 x layers x as many parameters"
    of_attention: ClassVar[bool] = True
    peft: ClassVar[PeftKind] = prompt_kind("PREFIX_TUNING")
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"prefix_projection": False}
    type: Literal["prefix_tuning"] = "prefix_tuning"
    prefix_projection: bool = False
    """Let keys and values come from an MLP while they are trained; files hold what it gives in the end."""
    encoder_hidden_size: Positive | None = None
    """Width of that MLP; left out: that of a layer's keys."""

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size: there is an encoder only with prefix_projection: true")
        return self

    def as_saved(self) -> PromptSettings:
        """Without the projection."""
        return PrefixTuningConfig(num_virtual_tokens=self.num_virtual_tokens)

    def encoder(self, site: PromptSite, generator: torch.Generator) -> nn.Module:
        """The table (K, L x 2 x G x d), or PEFT's `PrefixEncoder`, by the same names."""
        keys = site.keys()
        width = keys.heads * keys.width
        if not self.prefix_projection:
            return Table(torch.randn(self.num_virtual_tokens, keys.layers * 2 * width, generator=generator))
        hidden = self.encoder_hidden_size or width
        return draw(Projection(self.num_virtual_tokens, width, hidden, keys.layers * 2 * width), generator)


class Projection(nn.Module):
    """Embeddings of the places (K, G x d) through an MLP of two layers: (K, L x 2 x G x d)."""

    def __init__(self, number: int, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(number, width)
        self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))

    def forward(self) -> torch.Tensor:
        """(K, L x 2 x G x d)."""
        return self.transform(self.embedding.weight)
