"""Gemma 1, 2 and 3 (text)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank.export.gguf.pieces import Family, Fields, Part, plus_one, refuse_rope, transformer_fields

PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""Every how many layers one attends to everything, as llama.cpp has it built in."""


def parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Norms get their 1; the head is always the embedding."""
    if name == "lm_head.weight":
        return None
    return [Part(name, (name,), plus_one)] if name.endswith("norm.weight") else [Part(name, (name,))]


def fields(config: dict[str, Any]) -> Fields:
    """Caps of the scores, sliding windows, and the base frequency of the layers that have one."""
    own: Fields = {}
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(cap):
            own[cap] = float(config[cap])
    if config["model_type"] in PERIODS and config.get("sliding_window"):
        own["attention.sliding_window"] = config["sliding_window"]
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        if local.get("rope_theta"):
            own["rope.freq_base_swa"] = float(local["rope_theta"])
    return transformer_fields(config) | own


def refuse(config: dict[str, Any]) -> list[str]:
    """What llama.cpp has built in for these models."""
    problems = refuse_rope(config, "linear") if config["model_type"] == "gemma3_text" else refuse_rope(config)
    period = PERIODS.get(config["model_type"])
    kinds = config.get("layer_types")
    if period and kinds:
        built_in = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(len(kinds))]
        if kinds != built_in:
            problems.append(f"layer_types other than one full layer in {period}")
    scale = config.get("query_pre_attn_scalar")
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}.get(config["model_type"])
    built_in_scale = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    if period and scale is not None and scale != built_in_scale:
        problems.append(f"query_pre_attn_scalar: {scale} (llama.cpp computes with {built_in_scale})")
    if config["model_type"] == "gemma3_text" and config.get("attn_logit_softcapping"):
        problems.append("attn_logit_softcapping (llama.cpp has none in Gemma 3)")
    return problems


GEMMA = Family(
    arch="gemma", fields=fields, parts=parts, refuse=refuse, activations=("gelu_pytorch_tanh", "gelu", "gelu_new")
)

FAMILIES = {
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, arch="gemma2"),
    "gemma3_text": replace(GEMMA, arch="gemma3"),
}
