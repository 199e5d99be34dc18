"""The number of positions a model is made for, and whether lengths move them, from its config.json alone."""

from __future__ import annotations

from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "model_max_length", "n_ctx")
"""What families call it; `max_seq_len` is MPT's."""
_STRETCHED = ("linear", "yarn")
"""Kinds of stretching under which config.json may still say the length before it."""


def positions_of(config: Any) -> int | None:
    """Tokens of the longest document that a model of this transformers configuration reads; None where nothing limits
    it: no positions (Mamba), or distances that are added to the attention (ALiBi: Bloom, MPT, some of Falcon)."""
    text = config.get_text_config()
    if _has_alibi(text):
        return None
    named = (getattr(text, name, None) for name in (*_NAMES, "max_seq_len"))
    limit = next((value for value in named if isinstance(value, int) and value > 0), None)
    rope = getattr(text, "rope_parameters", None)
    if limit is None or not isinstance(rope, dict) or rope.get("rope_type") not in _STRETCHED:
        return limit
    made_for = rope.get("original_max_position_embeddings")
    return max(limit, int(made_for * rope.get("factor", 1.0))) if made_for else limit


def can_be_stretched(config: Any) -> bool:
    """Whether `model.rope_scaling` would make it read further."""
    rope = getattr(config.get_text_config(), "rope_parameters", None)
    return isinstance(rope, dict) and "rope_theta" in rope and rope.get("rope_type", "default") == "default"


def _has_alibi(text: Any) -> bool:
    inner = getattr(text, "attn_config", None)  # MPT
    described = [getattr(text, "alibi", False), getattr(inner, "alibi", False)]
    if isinstance(inner, dict):
        described.append(inner.get("alibi", False))
    return any(described) or text.model_type == "bloom" or getattr(text, "position_embedding_type", None) == "alibi"


def stretching_of(config: Any) -> tuple[str | None, int]:
    """("longrope" or "dynamic", longest document it does not affect) of a rotary embedding that looks at lengths."""
    given = getattr(config, "rope_parameters", None) or {}
    for parameters in [given] if "rope_type" in given else [each for each in given.values() if isinstance(each, dict)]:
        kind = parameters.get("rope_type")
        if kind in ("longrope", "dynamic"):
            return kind, parameters.get("original_max_position_embeddings") or config.max_position_embeddings
    return None, 0
