"""A small model of every family that can be converted, saved with a tokenizer, and the bound it is held to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.data.made_tokenizers import tokenizer_of
from tests.tiny_models import tiny

VOCABULARY = 640
EXACT, GELU = 1e-9, 1e-6
"""llama.cpp looks GELU up in a table of 16-bit values, and has only the tanh form of it."""

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": [2.0] * 8,
         "short_factor": [1.0 + i / 8 for i in range(8)]}  # fmt: skip
_GRANITE = {
    "logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1,
}  # fmt: skip


def _made(name: str, **changes: Any) -> Any:
    return tiny(name, **{**_COMMON, **changes})


FAMILIES: dict[str, tuple[Any, float]] = {
    "llama": (_made("LlamaConfig", attention_bias=True, mlp_bias=True), EXACT),
    "llama tied": (_made("LlamaConfig", tie_word_embeddings=True, head_dim=32), EXACT),
    "llama 3.1": (_made("LlamaConfig", rope_parameters=_LLAMA3), EXACT),
    "llama linear": (
        _made("LlamaConfig", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        EXACT,
    ),
    "mistral": (_made("MistralConfig", sliding_window=None, head_dim=32), EXACT),
    "mixtral": (_made("MixtralConfig", num_local_experts=4), EXACT),
    "qwen2": (_made("Qwen2Config"), EXACT),
    "qwen2 yarn": (
        _made(
            "Qwen2Config",
            rope_parameters={
                "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
            },
        ),
        EXACT,
    ),
    "qwen2_moe": (_made("Qwen2MoeConfig", **_EXPERTS, shared_expert_intermediate_size=48), EXACT),
    "qwen3": (_made("Qwen3Config", head_dim=32), EXACT),
    "qwen3_moe": (_made("Qwen3MoeConfig", **_EXPERTS, head_dim=16, norm_topk_prob=True), EXACT),
    "gemma": (_made("GemmaConfig", head_dim=16), GELU),
    "gemma2": (
        _made(
            "Gemma2Config",
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        ),
        GELU,
    ),
    "gemma3": (
        _made("Gemma3TextConfig", head_dim=16, sliding_window=8, query_pre_attn_scalar=16, num_hidden_layers=7),
        GELU,
    ),
    "phi3": (_made("Phi3Config", num_key_value_heads=4), EXACT),
    "phi3 longrope": (
        _made("Phi3Config", rope_parameters=_LONG, original_max_position_embeddings=256, num_key_value_heads=4),
        EXACT,
    ),
    "glm4": (_made("Glm4Config", head_dim=16), EXACT),
    "granite": (_made("GraniteConfig", **_GRANITE), EXACT),
    "granitemoe": (_made("GraniteMoeConfig", **_GRANITE, num_local_experts=4, num_experts_per_tok=2), EXACT),
    "deepseek_v2": (_made("DeepseekV2Config", **_LATENT, topk_method="greedy"), EXACT),
    "deepseek_v3": (_made("DeepseekV3Config", **_LATENT, n_group=2, topk_group=1), EXACT),
    "falcon": (
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1
        ),
        GELU,
    ),
    "falcon grouped": (
        lambda: transformers.FalconConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            bos_token_id=1,
        ),
        GELU,
    ),
    "bloom": (lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4), GELU),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
        ),
        GELU,
    ),
}  # fmt: skip


@cache
def _tokenizer() -> Any:
    return tokenizer_of("qwen2_5")


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the family, in evaluation mode; written to `folder` with a tokenizer."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(FAMILIES[family][0]()).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms and biases that say something
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            del name
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model
