"""Tiny random models that watch videos, as checkpoints on disk: those that see, with the processor of videos of their
family, which wants torchvision."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.tiny_audio_models import AUDIO_MODELS, omni_with_patches
from tests.tiny_vision_models import VISION_MODELS, VisionRecipe, make_model, save_folder

_QWEN_PLACE = "<|vision_start|><|video_pad|><|vision_end|>"
_QWEN = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
_SIZE = {"size": {"shortest_edge": 64, "longest_edge": 4096}}

PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"video_processor_type": "Qwen2VLVideoProcessor", "cap_pixels_per_frame": False, **_QWEN, **_SIZE},
    "qwen3_vl": {"video_processor_type": "Qwen3VLVideoProcessor", **_QWEN, **_SIZE},
    "llava_onevision": {
        "video_processor_type": "LlavaOnevisionVideoProcessor",
        "size": {"height": 8, "width": 8},
    },
    "qwen2_5_omni_thinker": {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "cap_pixels_per_frame": False,
        **_QWEN,
        "patch_size": 28,
    },
}
WATCHING: dict[str, VisionRecipe] = {
    "qwen2_5_vl": replace(VISION_MODELS["qwen2_5_vl"], video=_QWEN_PLACE),
    "qwen3_vl": replace(VISION_MODELS["qwen3_vl"], video=_QWEN_PLACE),
    "llava_onevision": replace(VISION_MODELS["llava_onevision"], video="<video>"),
    "qwen2_5_omni_thinker": replace(
        AUDIO_MODELS["qwen2_5_omni_thinker"],
        processor=partial(omni_with_patches, 28),  # its processor makes videos of 100,000 pixels at least
        config={**AUDIO_MODELS["qwen2_5_omni_thinker"].config, "vision_config": {"patch_size": 28, "window_size": 112}},
        video="<|vision_bos|><|VIDEO|><|vision_eos|>",
    ),
}


def make_watching(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model as its composite class, in evaluation mode, frozen."""
    return make_model(family, WATCHING[family], dtype)


def save_watching_folder(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as `from_pretrained` reads it, tokenizer, processors and chat template with it."""
    save_folder(path, WATCHING[family], lambda: make_watching(family, dtype))
    settings = json.dumps(PROCESSORS[family])
    (path / "video_preprocessor_config.json").write_text(settings, encoding="utf-8")
    return path
