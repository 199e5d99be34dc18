"""Tiny random models that hear, with the processor and chat template of their family, as checkpoints on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowrank.media.loading import class_named, make_processor
from tests.releases import older
from tests.tiny_composites import AUDIO, FIRST, IMAGE, LAST, VIDEO
from tests.tiny_vision_models import VISION_MODELS, VisionRecipe, make_model, save_folder

RATE = 16_000
"""Samples a second."""
_BEGIN, _END = 275, 276


def _whisper(seconds: int) -> Any:
    """A spectrum of 8 bands, 100 columns a second."""
    return transformers.WhisperFeatureExtractor(
        feature_size=8, sampling_rate=RATE, hop_length=RATE // 100, chunk_length=seconds
    )


def _qwen2_audio(tokenizer: Any) -> Any:
    parts = {"feature_extractor": _whisper(2)}
    return make_processor(class_named("Qwen2AudioProcessor"), parts, tokenizer)


def _omni(tokenizer: Any) -> Any:
    return omni_with_patches(4, tokenizer)


def omni_with_patches(patch: int, tokenizer: Any) -> Any:
    """Its processor, of pictures in patches of this side."""
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, temporal_patch_size=2, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=(8 * patch) ** 2
    )
    parts = {"image_processor": images, "feature_extractor": _whisper(4)}
    return make_processor(class_named("Qwen2_5OmniProcessor"), parts, tokenizer)


def _gemma4(tokenizer: Any) -> Any:
    images = transformers.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    sounds = transformers.Gemma4AudioFeatureExtractor(sampling_rate=RATE, feature_size=16)
    parts = {"image_processor": images, "feature_extractor": sounds}
    return make_processor(class_named("Gemma4Processor"), parts, tokenizer, image_seq_length=4)


_SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
_SOUND_TOKENS = {AUDIO: "<|AUDIO|>", _BEGIN: "<|audio_bos|>", _END: "<|audio_eos|>"}
_GEMMA_AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [16, 4],
    "output_proj_dims": 16,
    "attention_chunk_size": 4,
    "attention_context_left": 5,
    "attention_context_right": 0,
}

AUDIO_MODELS: dict[str, VisionRecipe] = {
    "qwen2_audio": VisionRecipe(
        _SOUND_TOKENS,
        "",
        _qwen2_audio,
        config={"audio_config": {"max_source_positions": 100}},
        sound=_SOUND,
    ),
    "qwen2_5_omni_thinker": VisionRecipe(
        {IMAGE: "<|IMAGE|>", VIDEO: "<|VIDEO|>", FIRST: "<|vision_bos|>", LAST: "<|vision_eos|>", **_SOUND_TOKENS},
        "<|vision_bos|><|IMAGE|><|vision_eos|>",
        _omni,
        {
            "image_token": "<|IMAGE|>",
            "video_token": "<|VIDEO|>",
            "audio_token": "<|AUDIO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        {
            "vision_start_token_id": FIRST,
            "vision_end_token_id": LAST,
            "audio_start_token_id": _BEGIN,
            "audio_config": {"max_source_positions": 100, "n_window": 20},
        },
        sound=_SOUND,
    ),
    "gemma4": replace(
        VISION_MODELS["gemma4"],
        processor=_gemma4,
        config={"audio_token_id": AUDIO, "audio_config": transformers.Gemma4AudioConfig(**_GEMMA_AUDIO)},
        sound="<|audio|>",
    ),
}


def make_audio_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model as its composite class, in evaluation mode, frozen."""
    return make_model(family, AUDIO_MODELS[family], dtype)


def save_audio_folder(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as `from_pretrained` reads it, tokenizer, processor and chat template with it."""
    if family == "qwen2_5_omni_thinker" and older("5.23"):
        pytest.skip("transformers 5.23: the thinker alone names its tokens and takes features")
    return save_folder(path, AUDIO_MODELS[family], lambda: make_audio_model(family, dtype))
