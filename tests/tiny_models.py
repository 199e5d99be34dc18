"""Tiny random models of many families, built on the spot, and segments to train them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.utils import logging

from lowrank.adapters.bank import Bank
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.settings import configs_in
from lowrank.train.engine import Engine

VOCABULARY = 97


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(name: str, **changes: Any) -> Callable[[], Any]:
    """A small configuration of transformers' class `name`, made anew at each call."""
    return lambda: getattr(transformers, name)(**{**SMALL, **changes})


_LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": tiny("LlamaConfig"),
    "mistral": tiny("MistralConfig", sliding_window=4),
    "mixtral": tiny("MixtralConfig", num_local_experts=4),
    "qwen2": tiny("Qwen2Config"),
    "qwen3": tiny("Qwen3Config", head_dim=8),
    "qwen3_moe": tiny("Qwen3MoeConfig", **_EXPERTS),
    "gemma": tiny("GemmaConfig", head_dim=8),
    "gemma2": tiny(
        "Gemma2Config",
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": tiny("Gemma3TextConfig", head_dim=8, sliding_window=4),
    "phi": tiny("PhiConfig"),
    "phi3": tiny("Phi3Config"),
    "glm4": tiny("Glm4Config", head_dim=8),
    "falcon": lambda: transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **_GPT2),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "olmo2": tiny("Olmo2Config"),
    "deepseek_v3": tiny("DeepseekV3Config", **_LATENT),
    "granite": tiny("GraniteConfig", logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere2": tiny("Cohere2Config", sliding_window=4),
    "gpt_oss": tiny("GptOssConfig", head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=2),
    "stablelm": tiny("StableLmConfig"),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "lfm2": tiny("Lfm2Config"),
    "jamba": tiny(
        "JambaConfig", mamba_d_state=4, mamba_dt_rank=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1
    ),
}


def make_model(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random model, in evaluation mode, frozen. `changes` overwrite its configuration."""
    torch.manual_seed(0)
    logging.set_verbosity_error()
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype).requires_grad_(False)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped expert kernels know no float64
    return model


def make_base(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Base:
    """A random model as a `Base`, its layout settled by the leak test."""
    base = Base(make_model(family, dtype, **changes), None, family)
    choose_layout(base, "auto")
    return base


def make_engine(base: Base, *configs: Any, micro_batch_tokens: int = 4096, **settings: Any) -> tuple[Engine, list[int]]:
    """An engine with one SFT job for each adapter config; job i has seed i. `settings` go to the optimizer."""
    bank = Bank(base)
    engine = Engine(base, bank, micro_batch_tokens)
    optimizer: Any = configs_in("lowrank.train.optimizers")[settings.pop("type", "adamw")](**settings)
    slots = []
    for seed, config in enumerate(configs):
        slots.append(bank.add(config, seed=seed))
        engine.add(slots[-1], SFTConfig().build(), optimizer, seed=seed, neftune_alpha=0.0)
    return engine, slots


def pretend_learned(engine: Engine, slot: int, *, seed: int, std: float = 0.1) -> None:
    """Draw the B of a slot's LoRA, which begins at 0, so that its adapter changes something."""
    for name, parameter in engine.bank.parameters(slot).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std, generator=torch.Generator().manual_seed(seed))
    engine.bank.refresh(slot)


def random_step(seed: int, lengths: Sequence[int], vocabulary: int = VOCABULARY) -> list[Segment]:
    """One optimizer step of random segments; about 60 % of the tokens carry weight."""
    generator = np.random.default_rng(seed)
    segments = []
    for length in lengths:
        weight_L = (generator.random(length) < 0.6).astype(np.float32)
        weight_L[0] = 0.0
        segments.append(Segment(generator.integers(3, vocabulary, length), weight_L))
    return number_the_step(segments)
