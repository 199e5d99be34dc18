"""Phi-3, Phi-3.5 and Phi-4 (text)."""

from __future__ import annotations

import math
from typing import Any

import torch

from lowrank.export.gguf.pieces import Family, Fields, head_dim, refuse_rope, rope, transformer_fields, windows


def rotated(config: dict[str, Any]) -> int:
    """Channels of a head that are rotated."""
    return int(rope(config).get("partial_rotary_factor", 1.0) * head_dim(config))


def original_context(config: dict[str, Any]) -> int:
    """Positions it was first trained on."""
    return (
        rope(config).get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )


def fields(config: dict[str, Any]) -> Fields:
    """A window of 0 tells llama.cpp that there is none."""
    own: Fields = {
        "rope.dimension_count": rotated(config),
        "rope.scaling.original_context_length": original_context(config),
        "attention.sliding_window": config.get("sliding_window") or 0,
    }
    scale = config["max_position_embeddings"] / original_context(config)
    if rope(config).get("rope_type") == "longrope":
        own["rope.scaling.attn_factor"] = (
            math.sqrt(1 + math.log(scale) / math.log(original_context(config))) if scale > 1.0 else 1.0
        )
    return transformer_fields(config) | own


def factors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """LongRoPE's divisors for texts within and beyond the first context, (rotated / 2) each."""
    parameters = rope(config)
    if parameters.get("rope_type") != "longrope":
        return {}
    return {
        f"rope_factors_{name}.weight": torch.tensor(parameters[f"{name}_factor"], dtype=torch.float32)
        for name in ("long", "short")
    }


def refuse(config: dict[str, Any]) -> list[str]:
    """Stretchings other than LongRoPE."""
    return refuse_rope(config, "longrope")


def notes(config: dict[str, Any]) -> list[str]:
    """llama.cpp chooses the factors by the context it is started with, transformers by the text's length."""
    found = windows(config)
    if rope(config).get("rope_type") == "longrope":
        found.append(
            f"llama.cpp rotates for long texts as soon as it is started with a context of more than "
            f"{original_context(config)} tokens; keep num_ctx below that where texts are short"
        )
    return found


FAMILIES = {"phi3": Family(arch="phi3", fields=fields, extra=factors, refuse=refuse, notes=notes)}
