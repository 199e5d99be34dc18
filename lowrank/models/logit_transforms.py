"""Transforms that a model applies to its logits before the softmax, read from its config.json alone."""

from __future__ import annotations

from typing import Any


def logit_transforms(config: Any) -> list[tuple[float, float | None]]:
    """What a model may do to its logits, the likeliest first; which it is, the model is asked at load time. Of
    composite models most do what their language model's configuration says, and some leave it out (Aya Vision)."""
    text = config.get_text_config()
    own = _logit_transform(text)
    return [own] if text is config else list(dict.fromkeys([own, _logit_transform(config), (1.0, None)]))


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """(multiplier, softcap) by the names transformers' configurations use."""
    multiplier = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        multiplier /= config.logits_scaling
    if getattr(config, "logit_scale", None) is not None and isinstance(config.logit_scale, (int, float)):  # Cohere
        multiplier *= config.logit_scale
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        multiplier *= config.lm_head_multiplier
    return multiplier, getattr(config, "final_logit_softcapping", None)
