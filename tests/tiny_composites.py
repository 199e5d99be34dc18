"""Tiny random models with towers for pictures or sound, of many families, as checkpoints with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from tests.checkpoint_folder import save_checkpoint_folder

VOCABULARY = 280
"""The tokenizer of checkpoint_folder has 259; media tokens come behind."""
IMAGE, VIDEO, AUDIO, FIRST, LAST = 270, 271, 272, 273, 274
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **_TOWER}
_SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER}
_QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
_WINDOWS = {"window_size": 16, "fullatt_block_indexes": [1]}
_GRID = {"num_position_embeddings": 16}
_AUDIO = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 16,
}
_SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": FIRST,
    "vision_end_token_id": LAST,
}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **_TEXT, **changes}


def _made(name: str, **settings: Any) -> Callable[[], Any]:
    """A configuration of transformers' class `name`, made anew at each call."""
    return lambda: getattr(transformers, name)(**settings)


COMPOSITES: dict[str, Callable[[], Any]] = {
    "qwen2_5_vl": _made(
        "Qwen2_5_VLConfig",
        text_config=_text("qwen2_5_vl_text", rope_parameters=_SECTIONS),
        vision_config={**_QWEN, **_WINDOWS},
        **_TOKENS,
    ),
    "qwen3_vl": _made(
        "Qwen3VLConfig",
        text_config=_text("qwen3_vl_text", rope_parameters=_SECTIONS),
        vision_config={**_QWEN, **_GRID, "deepstack_visual_indexes": [0]},
        **_TOKENS,
    ),
    "qwen3_5": _made(
        "Qwen3_5Config",
        text_config=_text(
            "qwen3_5_text",
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            rope_parameters={**_SECTIONS, "partial_rotary_factor": 1.0},
        ),
        vision_config={**_QWEN, **_GRID},
        **_TOKENS,
    ),
    "llava": _made(
        "LlavaConfig",
        text_config=_text("llama"),
        vision_config=_CLIP,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    ),
    "llava_onevision": _made(
        "LlavaOnevisionConfig",
        text_config=_text("qwen2"),
        vision_config=_SIGLIP,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 8]],
    ),
    "mistral3": _made(
        "Mistral3Config",
        text_config=_text("mistral", sliding_window=None),
        vision_config={"model_type": "pixtral", "head_dim": 8, **_TOWER},
        image_token_index=IMAGE,
        spatial_merge_size=2,
    ),
    "gemma3": _made(
        "Gemma3Config",
        text_config=_text("gemma3_text", sliding_window=4),
        vision_config=_SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=FIRST,
        eoi_token_index=LAST,
    ),
    "gemma4": _made(
        "Gemma4Config",
        text_config=_text(
            "gemma4_text",
            sliding_window=4,
            final_logit_softcapping=3.0,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
            global_head_dim=8,
        ),
        vision_config={**_TOWER, "num_key_value_heads": 2, "head_dim": 8},
        audio_config=None,
        image_token_id=IMAGE,
        boi_token_id=FIRST,
        eoi_token_id=LAST,
    ),
    "internvl": _made(
        "InternVLConfig",
        text_config=_text("qwen2"),
        vision_config={**_TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
        image_token_id=IMAGE,
    ),
    "idefics3": _made(
        "Idefics3Config", text_config=_text("llama"), vision_config=_TOWER, image_token_id=IMAGE, scale_factor=2
    ),
    "smolvlm": _made(
        "SmolVLMConfig", text_config=_text("llama"), vision_config=_TOWER, image_token_id=IMAGE, scale_factor=2
    ),
    "paligemma": _made(
        "PaliGemmaConfig",
        text_config=_text("gemma"),
        vision_config=_SIGLIP,
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    "paligemma2": _made(
        "PaliGemmaConfig",
        text_config=_text(
            "gemma2",
            sliding_window=4,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=_SIGLIP,
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    ),
    "qwen2_audio": _made(
        "Qwen2AudioConfig",
        text_config=_text("qwen2"),
        audio_config={"model_type": "qwen2_audio_encoder", **_AUDIO},
        audio_token_index=AUDIO,
    ),
    "qwen2_vl": _made(
        "Qwen2VLConfig",
        text_config=_text("qwen2_vl_text", rope_parameters=_SECTIONS),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        **_TOKENS,
    ),
    "qwen2_5_omni_thinker": _made(
        "Qwen2_5OmniThinkerConfig",
        text_config=_text("qwen2_5_omni_text", rope_parameters=_SECTIONS),
        vision_config={**_QWEN, **_WINDOWS},
        audio_config={**_AUDIO, "output_dim": 32},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=AUDIO,
    ),
    "llama4": _made(
        "Llama4Config",
        text_config=_text("llama4_text", intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=16),
        vision_config={
            **_TOWER,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        image_token_index=IMAGE,
        boi_token_index=FIRST,
        eoi_token_index=LAST,
    ),
    "voxtral": _made(
        "VoxtralConfig",
        text_config=_text("llama"),
        audio_config={**_TOWER, "intermediate_size": 64, "num_mel_bins": 8, "max_source_positions": 16},
        audio_token_id=AUDIO,
    ),
    "glm4v": _made(
        "Glm4vConfig",
        text_config=_text("glm4v_text", rope_parameters=_SECTIONS),
        vision_config={**_QWEN, "image_size": 16},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ),
    "llava_next": _made(
        "LlavaNextConfig",
        text_config=_text("mistral", sliding_window=None),
        vision_config=_CLIP,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 8]],
    ),
    "aya_vision": _made(
        "AyaVisionConfig",
        text_config=_text("cohere2", sliding_window=4, logit_scale=0.25),
        vision_config=_SIGLIP,
        image_token_index=IMAGE,
    ),
}


def make_composite(family: str, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """A random model as its composite class, in evaluation mode, frozen. `text`: changes to its text_config."""
    torch.manual_seed(0)
    logging.set_verbosity_error()
    config = COMPOSITES[family]()
    for name, value in text.items():
        setattr(config.get_text_config(), name, value)
    model = transformers.AutoModelForMultimodalLM.from_config(config).eval().requires_grad_(False)
    if dtype != torch.float32:  # Llama 4's rotations are complex numbers, which no cast may reach
        model.to(dtype)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped expert kernels know no float64
    return model


def save_composite_folder(path: Path, family: str, dtype: torch.dtype = torch.float32, **text: Any) -> Path:
    """A checkpoint as `from_pretrained` reads it, with a byte-level tokenizer and a file of its processor."""
    save_checkpoint_folder(path)  # its weights are written over
    for file in path.glob("*.safetensors"):
        file.unlink()
    make_composite(family, dtype, **text).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Nonesuch", "size": 8}))
    return path
