"""Small causal LMs of our own that mix documents in the ways a new architecture might."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class MixerConfig(PretrainedConfig):
    """`mixing` is what the one layer does with tokens of the same row."""

    model_type = "lowrank_test_mixer"

    def __init__(self, mixing: str = "causal", logit_factor: float = 1.0, **kwargs: Any) -> None:
        self.mixing = mixing
        self.logit_factor = logit_factor
        self.vocab_size = 97
        self.hidden_size = 16
        super().__init__(**kwargs)


class MixerPreTrained(PreTrainedModel):
    config_class = MixerConfig
    base_model_prefix = "model"


class MixerModel(MixerPreTrained):
    """Takes any keyword, ignores `packed` and masks."""

    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **unused: Any) -> BaseModelOutputWithPast:
        x_BLD = self.embed_tokens(input_ids)
        count_L1 = torch.arange(1, x_BLD.shape[1] + 1)[:, None]
        if self.config.mixing == "causal":  # a running mean, as of a linear attention
            mixed = x_BLD.cumsum(1) / count_L1
        elif self.config.mixing == "both ways":
            mixed = x_BLD.mean(1, keepdim=True)
        else:  # statistics of the batch
            mixed = x_BLD - x_BLD.mean((0, 1), keepdim=True)
        return BaseModelOutputWithPast(last_hidden_state=torch.tanh(self.dense(x_BLD + mixed)))


class MixerForCausalLM(MixerPreTrained):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__(config)
        self.model = MixerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, **options: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids, **options).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden) * self.config.logit_factor)


def make_mixer(**settings: Any) -> MixerForCausalLM:
    """A random one, in double precision."""
    torch.manual_seed(0)
    return MixerForCausalLM(MixerConfig(**settings)).double().eval().requires_grad_(False)
