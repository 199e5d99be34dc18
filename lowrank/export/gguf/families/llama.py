"""Llama 1 to 3.x, Mistral, Mixtral, Granite and Granite MoE: llama.cpp's own arrangement of heads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from lowrank.export.gguf.pieces import (
    Family,
    Fields,
    Part,
    head_dim,
    interleave_heads,
    moe_fields,
    refuse_rope,
    rope,
    transformer_fields,
    windows,
)


def fields(config: dict[str, Any]) -> Fields:
    """The common ones and the rotated channels."""
    return {**transformer_fields(config), "rope.dimension_count": head_dim(config)}


def parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Queries and keys change the order of their rows."""
    module = name.rpartition(".")[0]
    if module.endswith("q_proj"):
        return [Part(name, (name,), interleave_heads(config["num_attention_heads"]))]
    if module.endswith("k_proj"):
        return [Part(name, (name,), interleave_heads(config["num_key_value_heads"]))]
    return [Part(name, (name,))]


def llama3_frequencies(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Llama 3.1's stretching, as divisors of the rotary frequencies (D / 2): 1 for short waves, `factor` for long."""
    parameters = rope(config)
    if parameters.get("rope_type") != "llama3":
        return {}
    width = head_dim(config)
    frequency = 1.0 / (parameters["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context, factor = parameters["original_max_position_embeddings"], parameters["factor"]
    blend = ((context / (2 * math.pi / frequency) - low) / (high - low)).clamp(0.0, 1.0)
    return {"rope_freqs.weight": 1.0 / ((1.0 - blend) / factor + blend)}


def refuse(config: dict[str, Any]) -> list[str]:
    """Stretchings other than those known."""
    return refuse_rope(config, "linear", "yarn", "llama3")


LLAMA = Family(arch="llama", fields=fields, parts=parts, extra=llama3_frequencies, refuse=refuse, notes=windows)


def granite_fields(config: dict[str, Any]) -> Fields:
    """Granite's multipliers. Its head size cannot be told."""
    own = {
        "attention.scale": float(config["attention_multiplier"]),
        "embedding_scale": float(config["embedding_multiplier"]),
        "residual_scale": float(config["residual_multiplier"]),
        "logit_scale": float(config["logits_scaling"]),
    }
    return {key: value for key, value in fields(config).items() if not key.startswith("attention.key_l")} | own


def granite_moe_fields(config: dict[str, Any]) -> Fields:
    """Granite's, and its experts."""
    return granite_fields(config) | moe_fields(config)


def granite_moe_parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Granite saves an expert's gate and up projection as one tensor, gate first."""
    layer = name.partition(".block_sparse_moe.")[0]
    width = config["intermediate_size"]
    if name.endswith("block_sparse_moe.input_linear.weight"):
        return [
            Part(f"{layer}.mlp.experts.gate_proj.weight", (name,), lambda both: both[:, :width]),
            Part(f"{layer}.mlp.experts.up_proj.weight", (name,), lambda both: both[:, width:]),
        ]
    if name.endswith("block_sparse_moe.output_linear.weight"):
        return [Part(f"{layer}.mlp.experts.down_proj.weight", (name,))]
    return parts(config, name)


GRANITE = replace(LLAMA, arch="granite", fields=granite_fields)

FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(
        LLAMA,
        fields=lambda config: fields(config) | moe_fields(config),
        experts={"w1": "w1", "w2": "w2", "w3": "w3"},
    ),
    "granite": GRANITE,
    "granitemoe": replace(GRANITE, arch="granitemoe", fields=granite_moe_fields, parts=granite_moe_parts),
}
