"""The attention masks that a model's own class makes. The class alone says so, without weights, so plans of memory and
exports can ask too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from lowrank.models.tower import wanted_by
from lowrank.records import KIND_NAMES

_TYPES = "token_type_ids"
_KINDS = {_TYPES, "mm_token_type_ids"}
"""What tells the tokens of pictures, or of prompts, from others."""
_CACHES = {"cache", "past_key_values"}
"""The KV cache, as transformers calls it from 5.24 on, and before."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""Kinds of attention layers, by transformers' names: over all earlier tokens, and over a window of them."""


def layers_both_ways(model: Any, kind: int) -> frozenset[str]:
    """The kinds of layers in which neighboring tokens of one type attend to one another in both directions, as a
    picture's do in Gemma 3 and 4; empty for most models, and for prefix language models, whose types mark prompts."""
    if prompt_type_of(model) is not None:
        return frozenset()
    seen = _seen(model, [0, kind, kind, 0])
    return frozenset(layers for layers, seen_LL in seen.items() if seen_LL[1][2] and not seen_LL[0][1])


def prompt_type_of(model: Any) -> int | None:
    """The `token_type_ids` of a prompt's tokens in a prefix language model, which reads prompts both ways and what
    follows from left to right; None: it is none. See models/checks/isolation.py, which asks the model itself."""
    if _TYPES not in _taken(model):
        return None
    for kind in possible_prompt_types(model.base_model):
        found = _seen(model, [kind, kind, 1 - kind, 1 - kind])
        if found and all(seen[0][1] and not seen[2][3] for seen in found.values()):
            return kind
    return None


def possible_prompt_types(backbone: Any) -> tuple[int, ...]:
    """What may stand for a prompt among `token_type_ids`: beside a tower, 1 stands for pictures (Gemma 3)."""
    return (0,) if any(wanted_by(kind, backbone) for kind in KIND_NAMES) else (0, 1)


def _taken(model: Any) -> set[str]:
    return _parameters(model) & _KINDS


def _parameters(model: Any) -> set[str]:
    make = getattr(type(model), "create_masks_for_generate", None)
    return set(inspect.signature(make).parameters) if make else set()


def _seen(model: Any, kinds: Sequence[int]) -> dict[str, list[list[bool]]]:
    """(L, L) for each kind of layer: whether a token sees another, of tokens of these types; none where the model knows
    no types."""
    taken = _taken(model)
    if not taken:
        return {}
    config = model.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        with _disable_current_modes(), torch.device("cpu"):
            kind_1L = torch.tensor([list(kinds)])
            masks = type(model).create_masks_for_generate(
                config=model.config,
                inputs_embeds=torch.zeros(1, len(kinds), 1),
                attention_mask=torch.ones_like(kind_1L),
                position_ids=torch.arange(len(kinds))[None],
                is_first_iteration=True,
                **dict.fromkeys(_parameters(model) & _CACHES),
                **dict.fromkeys(taken, kind_1L),
            )
            found = dict(masks) if isinstance(masks, Mapping) else {FULL: masks}
            return {
                layers: (mask[0, 0] == 0).tolist() for layers, mask in found.items() if isinstance(mask, torch.Tensor)
            }
    finally:
        config._attn_implementation = before
