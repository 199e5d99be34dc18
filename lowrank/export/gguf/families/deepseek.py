"""DeepSeek V2, V2.5, V3 and R1: attention through a compressed cache (MLA)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from lowrank.export.gguf.families.qwen import PROJECTIONS
from lowrank.export.gguf.pieces import Family, Fields, Make, Part, moe_fields, refuse_rope, rope, transformer_fields

SOFTMAX, SIGMOID = 1, 2
"""GGUF's numbers for how experts are chosen."""


def fields(config: dict[str, Any]) -> Fields:
    """llama.cpp sees one wide head of keys and values, and opens it to many."""
    common = transformer_fields({**config, "num_key_value_heads": 1, "head_dim": None})
    wide, rotated = config["kv_lora_rank"], config["qk_rope_head_dim"]
    third = config["model_type"] == "deepseek_v3"
    own: Fields = {
        "leading_dense_block_count": config["first_k_dense_replace"],
        "attention.kv_lora_rank": wide,
        "attention.key_length": wide + rotated,
        "attention.value_length": wide,
        "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        **moe_fields(config),
        "expert_shared_count": config["n_shared_experts"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(third and config["norm_topk_prob"]),
        "expert_gating_func": SIGMOID if third else SOFTMAX,
        "rope.dimension_count": rotated,
    }
    if config.get("q_lora_rank"):
        own["attention.q_lora_rank"] = config["q_lora_rank"]
    if third and (config.get("n_group") or 1) > 1:
        own |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    if rope(config).get("mscale_all_dim") is not None:
        own["rope.scaling.yarn_log_multiplier"] = 0.1 * rope(config)["mscale_all_dim"]
    return common | own


def parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """The matrix that opens the cache is split by head into keys, transposed, and values."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config["num_hidden_layers"]:
        return None  # layers that predict several tokens at once
    if name.endswith("e_score_correction_bias"):
        return [Part(name.replace("gate.e_score_correction_bias", "gate.e_score_correction.bias"), (name,))]
    if not name.endswith("kv_b_proj.weight"):
        return [Part(name, (name,))]
    return [
        Part(name.replace("kv_b_proj", "k_b_proj"), (name,), _half(config, keys=True)),
        Part(name.replace("kv_b_proj", "v_b_proj"), (name,), _half(config, keys=False)),
    ]


def _half(config: dict[str, Any], keys: bool) -> Make:
    heads, width = config["num_attention_heads"], config["qk_nope_head_dim"]

    def make(tensor: torch.Tensor) -> torch.Tensor:
        head = tensor.reshape(heads, width + config["v_head_dim"], tensor.shape[-1])
        return head[:, :width].transpose(1, 2) if keys else head[:, width:]

    return make


def refuse(config: dict[str, Any]) -> list[str]:
    """What llama.cpp computes otherwise."""
    problems = refuse_rope(config, "yarn")
    if config["model_type"] == "deepseek_v3" and not config.get("rope_interleave", True):
        problems.append("rope_interleave: false (llama.cpp rotates neighboring channels)")
    if config["model_type"] == "deepseek_v2":
        if config.get("topk_method", "greedy") != "greedy" and (config.get("n_group") or 1) > 1:
            problems.append("topk_method group_limited_greedy (llama.cpp takes the best of all groups)")
        if config.get("norm_topk_prob"):
            problems.append("norm_topk_prob: true (transformers itself ignores it)")
    if config.get("attention_bias"):
        problems.append("attention_bias")
    return problems


SECOND = Family(arch="deepseek2", fields=fields, parts=parts, refuse=refuse, experts=PROJECTIONS)

FAMILIES = {"deepseek_v2": SECOND, "deepseek_v3": replace(SECOND)}
