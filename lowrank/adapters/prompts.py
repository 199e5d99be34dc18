"""Adapters that put trained vectors before every document instead of changing a layer: settings, and their tables.

A slot has `num_virtual_tokens` more tokens at the beginning of each of its documents, and a table with one row for
each: what stands in the place of their embeddings (D), or of their keys and values at every layer (L x 2 x G x d).
Files hold the table, as PEFT's `prompt_embeddings`; in training it may come from an encoder, which is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind
from lowrank.settings import Positive

TABLE = "prompt_embeddings"
"""The one tensor of such an adapter in files."""


@dataclass(frozen=True)
class KeyShape:
    """What a base's layers attend to: L layers of G heads of width d, for keys and for values."""

    layers: int
    heads: int
    width: int


@dataclass(frozen=True)
class PromptSite:
    """What a table may be made from."""

    hidden_size: int
    vocabulary: int
    embed: Callable[[torch.Tensor], torch.Tensor]
    """(N) token ids -> (N, D), as the model's embedding gives them."""
    tokens_of: Callable[[str], list[int]]
    """A text's token ids."""
    keys: Callable[[], KeyShape]
    """Asks the model itself. ModelError where its layers differ."""


def prompt_kind(peft_type: str) -> PeftKind:
    """A type of PEFT whose files hold one table and few settings."""
    return PeftKind(
        peft_type,
        names={"num_virtual_tokens": "num_virtual_tokens"},
        ignored=frozenset(
            {
                "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
                "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection",
                "encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type",
            }
        ),  # what the table's shape says, or how it came to be
    )  # fmt: skip


class PromptSettings(AdapterSettings):
    """Settings of all adapters that are virtual tokens."""

    of_attention: ClassVar[bool] = False
    """The table stands in for keys and values, not for embeddings."""
    refused: ClassVar[Mapping[str, str]] = {
        "modules_to_save": "a prompt is all there is in its files; train copies with a lora job",
        "target_parameters": "a prompt reaches no weights",
    }
    unused: ClassVar[tuple[str, ...]] = (
        "rank", "alpha", "dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
        "loraplus_lr_ratio", "loraplus_lr_embedding",
        "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model",
    )  # fmt: skip
    num_virtual_tokens: Positive = 20
    """Trained vectors before every document. They count for the model's reach, and not in any number reported."""

    @property
    def unmergeable(self) -> str | None:
        """Always: why no export can merge it, as the end of a sentence, and what to do instead."""
        return (
            "its virtual tokens are no weights of the model, so nothing can be merged: serve it as it is "
            "(lowrank serve), or take it to PEFT (--to peft)"
        )

    @property
    def title(self) -> str:
        """In a few words: `prompt_tuning 20 tokens`."""
        return f"{getattr(self, 'type', 'prompt')} {self.num_virtual_tokens} tokens"

    def encoder(self, site: PromptSite, generator: torch.Generator) -> nn.Module:
        """Trained, in float32; called without arguments it gives the table (K, W). ValueError if it cannot be made."""
        raise NotImplementedError

    def learning_rate_factor(self, name: str, parameter: torch.Tensor, learning_rate: float) -> float:
        """1: LoRA+ is about matrices of LoRA."""
        del name, parameter, learning_rate
        return 1.0


class Table(nn.Module):
    """The table itself is what is trained."""

    def __init__(self, value_KW: torch.Tensor) -> None:
        super().__init__()
        self.prompt_embeddings = nn.Parameter(value_KW)

    def forward(self) -> torch.Tensor:
        """(K, W)."""
        return self.prompt_embeddings


@torch.no_grad()
def draw(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Begin as torch begins linear layers, LSTMs and lookup tables, from `generator` alone."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            part.weight.normal_(generator=generator)
        elif isinstance(part, (nn.Linear, nn.LSTM)):
            fan: Any = part.in_features if isinstance(part, nn.Linear) else part.hidden_size
            for parameter in part.parameters():
                parameter.uniform_(-(fan**-0.5), fan**-0.5, generator=generator)
    return module
