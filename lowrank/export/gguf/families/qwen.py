"""Qwen 2, 2.5 and 3, their mixtures of experts, and the language models of Qwen 2 VL, 2.5 VL and 3 VL."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lowrank.export.gguf.pieces import Family, Fields, Part, moe_fields, refuse_rope, rope, transformer_fields, windows

PROJECTIONS = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


def refuse(config: dict[str, Any]) -> list[str]:
    """Stretchings other than those known."""
    return refuse_rope(config, "linear", "yarn")


def mixture_fields(config: dict[str, Any]) -> Fields:
    """The experts' widths."""
    fields = transformer_fields(config) | moe_fields(config)
    fields["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if config.get("shared_expert_intermediate_size"):
        fields["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return fields


def mixture_parts(config: dict[str, Any], name: str) -> list[Part] | None:
    """Experts saved as one 3-D tensor, (E, 2 I, D) and (E, D, I)."""
    before, found, matrix = name.partition(".mlp.experts.")
    matrix = matrix.removesuffix(".weight")
    if found and matrix == "gate_up_proj":
        width = config["moe_intermediate_size"]
        return [
            Part(f"{before}.mlp.experts.gate_proj.weight", (name,), lambda both: both[:, :width]),
            Part(f"{before}.mlp.experts.up_proj.weight", (name,), lambda both: both[:, width:]),
        ]
    if found and matrix == "down_proj":
        return [Part(f"{before}.mlp.experts.down_proj.weight", (name,))]
    return [Part(name, (name,))]


def refuse_mixture(config: dict[str, Any]) -> list[str]:
    """llama.cpp has these two choices built in."""
    normed = config["model_type"] == "qwen3_moe"
    problems = refuse(config)
    if bool(config.get("norm_topk_prob")) != normed:
        problems.append(f"norm_topk_prob: {config.get('norm_topk_prob')} (llama.cpp computes {normed})")
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        problems.append("layers without experts between layers with them (decoder_sparse_step, mlp_only_layers)")
    return problems


def refuse_vision(config: dict[str, Any]) -> list[str]:
    """`mrope` is what old files call the rotation in three dimensions."""
    return refuse_rope(config, "mrope")


def vision_fields(config: dict[str, Any]) -> Fields:
    """Pictures have places in time, height and width; each of these turns a section of a head."""
    sections = [int(size) for size in rope(config)["mrope_section"]]
    return {**transformer_fields(config), "rope.dimension_sections": [*sections, *[0] * (4 - len(sections))]}


def deepstack_fields(config: dict[str, Any]) -> Fields:
    """And the tower gives features to so many of the first layers."""
    vision = config.get("vision_config") or {}
    return {**vision_fields(config), "n_deepstack_layers": len(vision.get("deepstack_visual_indexes") or ())}


DENSE = Family(arch="qwen2", fields=transformer_fields, refuse=refuse, notes=windows)
MIXTURE = replace(
    DENSE, arch="qwen2moe", fields=mixture_fields, parts=mixture_parts, refuse=refuse_mixture, experts=PROJECTIONS
)

VISION_MODELS = replace(DENSE, arch="qwen2vl", fields=vision_fields, refuse=refuse_vision)

FAMILIES = {
    "qwen2_vl_text": VISION_MODELS,
    "qwen2_5_vl_text": VISION_MODELS,
    "qwen3_vl_text": replace(VISION_MODELS, arch="qwen3vl", fields=deepstack_fields),
    "qwen2": DENSE,
    "qwen3": replace(DENSE, arch="qwen3"),
    "qwen2_moe": MIXTURE,
    "qwen3_moe": replace(MIXTURE, arch="qwen3moe"),
}
