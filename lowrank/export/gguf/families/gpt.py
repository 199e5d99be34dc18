"""GPT-2, BLOOM and Falcon: learned or no positions, layer norms with a bias, queries, keys and values in one."""

from __future__ import annotations

from typing import Any

import torch

from lowrank.export.gguf.pieces import Family, Fields, Make, Part, rope_fields


def gpt2_fields(config: dict[str, Any]) -> Fields:
    """GPT-2 names its sizes otherwise."""
    return {
        "block_count": config["n_layer"],
        "context_length": config["n_positions"],
        "embedding_length": config["n_embd"],
        "feed_forward_length": config["n_inner"] or 4 * config["n_embd"],
        "attention.head_count": config["n_head"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
    }


def gpt2_parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Its Conv1D layers keep their weights as (in, out)."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return [Part(name, (name,), _turn)] if turned else [Part(name, (name,))]


def _turn(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T


def gpt2_refuse(config: dict[str, Any]) -> list[str]:
    """Two options nobody uses and llama.cpp lacks."""
    problems = [] if config.get("scale_attn_weights", True) else ["scale_attn_weights: false"]
    return problems + (["scale_attn_by_inverse_layer_idx"] if config.get("scale_attn_by_inverse_layer_idx") else [])


def bloom_fields(config: dict[str, Any]) -> Fields:
    """Positions come from a slope (ALiBi), so the context length is what it was trained on."""
    return {
        "block_count": config["n_layer"],
        "context_length": config.get("seq_length") or 2048,
        "embedding_length": config["hidden_size"],
        "feed_forward_length": 4 * config["hidden_size"],
        "attention.head_count": config["n_head"],
        "attention.head_count_kv": config["n_head"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
    }


def by_kind(heads: int) -> Make:
    """(heads x (q, k, v) x D, ...) to (q of all heads, k of all, v of all)."""

    def make(tensor: torch.Tensor) -> torch.Tensor:
        rest = tensor.shape[1:]
        return tensor.reshape(heads, 3, -1, *rest).transpose(0, 1).reshape(tensor.shape)

    return make


def bloom_parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Heads are sorted by kind."""
    there = name.removeprefix("transformer.")
    turned = ".query_key_value." in name
    return [Part(there, (name,), by_kind(config["n_head"]))] if turned else [Part(there, (name,))]


def bloom_refuse(config: dict[str, Any]) -> list[str]:
    """An option llama.cpp lacks."""
    return (
        ["apply_residual_connection_post_layernorm"] if config.get("apply_residual_connection_post_layernorm") else []
    )


def falcon_kv_heads(config: dict[str, Any]) -> int:
    """Heads of keys and values: one, unless the architecture is the new one or says it has no multi_query."""
    if config["new_decoder_architecture"]:
        return config.get("num_kv_heads") or config["num_attention_heads"]
    return 1 if config["multi_query"] else config["num_attention_heads"]


def falcon_fields(config: dict[str, Any]) -> Fields:
    """Falcon's."""
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config.get("max_position_embeddings") or 2048,
        "tensor_data_layout": "jploski",
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": falcon_kv_heads(config),
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        **rope_fields(config),
    }


def falcon_parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Each group of heads is stored as its queries, one key, one value."""
    if ".query_key_value." not in name:
        return [Part(name, (name,))]
    groups = falcon_kv_heads(config)
    heads = config["num_attention_heads"]

    def make(tensor: torch.Tensor) -> torch.Tensor:
        rest = tensor.shape[1:]
        group = tensor.reshape(groups, heads // groups + 2, -1, *rest)
        kinds = (group[:, :-2], group[:, -2:-1], group[:, -1:])
        return torch.cat([kind.reshape(-1, *rest) for kind in kinds])

    return [Part(name, (name,), make)]


def falcon_refuse(config: dict[str, Any]) -> list[str]:
    """What llama.cpp's Falcon is not."""
    problems = ["alibi"] if config.get("alibi") else []
    if not config.get("parallel_attn", True) and not config["new_decoder_architecture"]:
        problems.append("parallel_attn: false")
    return problems + (["bias"] if config.get("bias") else [])


FAMILIES = {
    "gpt2": Family("gpt2", gpt2_fields, gpt2_parts, refuse=gpt2_refuse, activations=("gelu_new", "gelu_pytorch_tanh")),
    "bloom": Family("bloom", bloom_fields, bloom_parts, refuse=bloom_refuse, activations=("gelu",)),
    "falcon": Family("falcon", falcon_fields, falcon_parts, refuse=falcon_refuse, activations=("gelu",)),
}
