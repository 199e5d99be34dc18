"""Prompt tuning: trained vectors in the place of the embeddings of tokens before every document (arXiv:2104.08691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import nn
from typing_extensions import Self

from lowrank.adapters.peft_kind import PeftKind
from lowrank.adapters.prompts import PromptSettings, PromptSite, Table, prompt_kind


class PromptTuningConfig(PromptSettings):
    """Prompt tuning: a few kB per task, nothing in the model changes."""

    paper: ClassVar[str] = "arXiv:2104.08691"
    when: ClassVar[str] = "many small tasks on a large base; learns slower than lora, at a high learning rate (1e-2)"
    peft: ClassVar[PeftKind] = prompt_kind("PROMPT_TUNING")
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"prompt_tuning_init": "RANDOM"}
    type: Literal["prompt_tuning"] = "prompt_tuning"
    prompt_tuning_init: Literal["SAMPLE_VOCAB", "RANDOM", "TEXT"] = "SAMPLE_VOCAB"
    """Where the vectors begin. SAMPLE_VOCAB: as embeddings of tokens drawn from the vocabulary. RANDOM: as standard
    normal numbers, PEFT's default. TEXT: as the embeddings of a text."""
    prompt_tuning_init_text: str | None = None
    """The text for TEXT, cut or repeated to the number of virtual tokens."""

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        if (self.prompt_tuning_init == "TEXT") != bool(self.prompt_tuning_init_text):
            raise ValueError("prompt_tuning_init: TEXT and prompt_tuning_init_text need each other")
        return self

    def encoder(self, site: PromptSite, generator: torch.Generator) -> nn.Module:
        """The table (K, D)."""
        number = self.num_virtual_tokens
        if self.prompt_tuning_init == "RANDOM":
            return Table(torch.randn(number, site.hidden_size, generator=generator))
        if self.prompt_tuning_init == "SAMPLE_VOCAB":
            return Table(site.embed(torch.randint(0, site.vocabulary, (number,), generator=generator)))
        token_L = site.tokens_of(self.prompt_tuning_init_text or "")
        if not token_L:
            raise ValueError("prompt_tuning_init_text has no tokens")
        return Table(site.embed(torch.tensor((token_L * -(-number // len(token_L)))[:number])))
