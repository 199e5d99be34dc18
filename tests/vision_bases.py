"""Bases that see, loaded from tiny checkpoints, and segments about pictures for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.media.processor import processor_of
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.segments import Segment
from tests.media_rows import segments_in
from tests.tiny_vision_models import VISION_MODELS, as_parameters, save_vision_folder

PADDED = {"qwen3_5"}
"""Linear attention."""


FLOAT32_INSIDE = {"gemma3", "gemma4", "qwen3_5", "paligemma"}
REPRESENTATIVE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "paligemma")
families = pytest.mark.parametrize("family", as_parameters(VISION_MODELS, REPRESENTATIVE))


def vision_base(path: Path, family: str, dtype: str = "float64", **settings: Any) -> Any:
    """(the base, its tokenizer, what was said)."""
    save_vision_folder(path, family, getattr(torch, dtype))
    return base_of(path, dtype, **settings)


def base_of(path: Path, dtype: Any, **settings: Any) -> Any:
    """The same, of a checkpoint that is there."""
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu", **settings)
    tokenizer = load_tokenizer(config)
    base = load(config, tokenizer=tokenizer, notify=lambda _: None)
    processor = processor_of(tokenizer)
    assert processor is not None
    return base, tokenizer, give_media_encoder(base, processor, config.attention)


def segments_of(path: Path, tokenizer: Any) -> list[Segment]:
    """Of LLaMA-Factory's demonstration: six conversations with one or two pictures, and a question without any."""
    segments = segments_in(tokenizer, path)
    first = segments[0]
    assert first.media is not None
    end = first.media.spans[-1][1] + 1
    return [*segments, replace(first, token_L=first.token_L[end:], weight_L=first.weight_L[end:], media=None)]
