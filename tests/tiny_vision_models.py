"""Tiny random models that see, with the processor and chat template of their family, as checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowrank.data.templates import source_of
from lowrank.media.loading import class_named, make_processor
from lowrank.media.torchvision import torchvision_problem
from tests.checkpoint_folder import save_checkpoint_folder
from tests.tiny_composites import AUDIO, COMPOSITES, FIRST, IMAGE, LAST, VIDEO

VOCABULARY = 288
_BREAK, _END, _SPARE = 275, 276, 277
_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'PLACE' }}{% elif part['type'] == 'audio' %}{{ 'SOUND' }}"
    "{% elif part['type'] == 'video' %}{{ 'FILM' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_FIRST_PICTURES = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
"""As LLaVA-1.5's writes them: a turn's pictures before its text."""


@dataclass(frozen=True)
class VisionRecipe:
    """What makes a tiny composite see: names of its tokens by id, its processor, the place in its template."""

    tokens: dict[int, str]
    place: str
    processor: Callable[[Any], Any]
    named: dict[str, str] = field(default_factory=dict)
    """What the tokenizer's files call some of its tokens."""
    config: dict[str, Any] = field(default_factory=dict)
    template: str = _PARTS
    sound: str = ""
    """The place of a sound in its template."""
    video: str = ""
    """The place of a video in its template."""
    bos: str = ""
    """What its tokenizer's files call the first token of a text."""


_QWEN_TOKENS = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", FIRST: "<|vision_start|>", LAST: "<|vision_end|>"}
_QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
_SMALL = {"height": 8, "width": 8}


def _qwen(name: str, patch: int = 4) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        images = transformers.Qwen2VLImageProcessorPil(
            patch_size=patch, temporal_patch_size=2, merge_size=2, min_pixels=(2 * patch) ** 2, max_pixels=32 * 32
        )
        return _processor(name, images, tokenizer)

    return make


def _processor(name: str, images: Any, tokenizer: Any, **settings: Any) -> Any:
    return make_processor(class_named(name), {"image_processor": images}, tokenizer, **settings)


def _llava(tokenizer: Any) -> Any:
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=_SMALL)
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def _onevision(tokenizer: Any) -> Any:
    images = transformers.LlavaOnevisionImageProcessorPil(size=_SMALL, image_grid_pinpoints=[[8, 8], [8, 16], [16, 8]])
    return _processor(
        "LlavaOnevisionProcessor", images, tokenizer, num_image_tokens=4, vision_feature_select_strategy="full"
    )


def _gemma3(tokenizer: Any) -> Any:
    images = transformers.Gemma3ImageProcessorPil(size=_SMALL, do_pan_and_scan=False)
    return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _internvl(tokenizer: Any) -> Any:
    images = transformers.GotOcr2ImageProcessorPil(size=_SMALL, crop_to_patches=True, min_patches=1, max_patches=3)
    return _processor("InternVLProcessor", images, tokenizer, image_seq_length=1)


def _idefics3(tokenizer: Any) -> Any:
    images = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 16}, max_image_size={"longest_edge": 8})
    return transformers.Idefics3Processor(images, tokenizer, image_seq_len=1)


def _pixtral(tokenizer: Any) -> Any:
    images = transformers.PixtralImageProcessorPil(patch_size=4, size={"longest_edge": 24})
    return _processor("PixtralProcessor", images, tokenizer, patch_size=4, spatial_merge_size=2)


def _paligemma(tokenizer: Any) -> Any:
    images = transformers.SiglipImageProcessorPil(size=_SMALL)
    images.image_seq_length = 4
    return _processor("PaliGemmaProcessor", images, tokenizer)


def _gemma4(tokenizer: Any) -> Any:
    images = transformers.Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70, pooling_kernel_size=3)
    return _processor("Gemma4Processor", images, tokenizer, image_seq_length=4)


WANT_TORCHVISION = ("mistral3",)
"""Families whose processor imports it, also for pictures."""
VISION_MODELS: dict[str, VisionRecipe] = {
    "qwen2_5_vl": VisionRecipe(_QWEN_TOKENS, _QWEN_PLACE, _qwen("Qwen2_5_VLProcessor")),
    "qwen2_vl": VisionRecipe(_QWEN_TOKENS, _QWEN_PLACE, _qwen("Qwen2VLProcessor")),
    "qwen3_vl": VisionRecipe(_QWEN_TOKENS, _QWEN_PLACE, _qwen("Qwen3VLProcessor")),
    "qwen3_5": VisionRecipe(_QWEN_TOKENS, _QWEN_PLACE, _qwen("Qwen3VLProcessor")),
    "llava": VisionRecipe(
        {IMAGE: "<image>"},
        "<image>",
        _llava,
        config={"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
        template=_FIRST_PICTURES,
    ),
    "llava_onevision": VisionRecipe(
        {IMAGE: "<image>", VIDEO: "<video>"},
        "<image>",
        _onevision,
        config={"image_grid_pinpoints": [[8, 8], [8, 16], [16, 8]]},
    ),
    "mistral3": VisionRecipe({IMAGE: "[IMG]", _BREAK: "[IMG_BREAK]", _END: "[IMG_END]"}, "[IMG]", _pixtral),
    "gemma3": VisionRecipe(
        {IMAGE: "<image_soft_token>", FIRST: "<start_of_image>", LAST: "<end_of_image>"},
        "<start_of_image>",
        _gemma3,
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        config={  # with windows of four alone, answers would see nothing of pictures
            "text_config": {"layer_types": ["sliding_attention", "full_attention"]}
        },
    ),
    "gemma4": VisionRecipe(
        {
            IMAGE: "<|image|>",
            FIRST: "<|image>",
            LAST: "<image|>",
            VIDEO: "<|video|>",
            AUDIO: "<|audio|>",
            _BREAK: "<|audio>",
            _END: "<audio|>",
        },
        "<|image|>",
        _gemma4,
        {
            "image_token": "<|image|>",
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "audio_token": "<|audio|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
        },
        config={"text_config": {"vocab_size_per_layer_input": VOCABULARY}},
    ),
    "paligemma": VisionRecipe(
        {IMAGE: "<image>", _BREAK: "<bos>"},
        "<image>",
        _paligemma,
        config={"text_config": {"vocab_size": 1536}, "tie_word_embeddings": False},  # its processor brings 1,152 tokens
        template=source_of("paligemma"),
        bos="<bos>",
    ),
    "internvl": VisionRecipe(
        {IMAGE: "<IMG_CONTEXT>", FIRST: "<img>", LAST: "</img>", VIDEO: "<video>"},
        "<IMG_CONTEXT>",
        _internvl,
        {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    ),
    "idefics3": VisionRecipe(
        {IMAGE: "<image>", FIRST: "<fake_token_around_image>", _SPARE: "<end_of_utterance>", _BREAK: "<global-img>"},
        "<image>",
        _idefics3,
    ),
}


def as_parameters(families: Iterable[str], representative: Collection[str] | None = None) -> list[Any]:
    """For `parametrize`: skipped where a family's processor cannot be had, slow but for the `representative` (None: all
    of them)."""
    problem = torchvision_problem()
    found = []
    for family in families:
        marks = [pytest.mark.slow] if representative is not None and family not in representative else []
        if family in WANT_TORCHVISION and problem is not None:
            marks.append(pytest.mark.skip(reason=problem))
        found.append(pytest.param(family, marks=marks))
    return found


def make_vision_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model as its composite class, in evaluation mode, frozen."""
    return make_model(family, VISION_MODELS[family], dtype)


def make_model(family: str, recipe: VisionRecipe, dtype: torch.dtype = torch.float32) -> Any:
    """The same, of what is in no table."""
    torch.manual_seed(0)
    config = COMPOSITES[family]()
    config.get_text_config().vocab_size = VOCABULARY
    for name, value in recipe.config.items():
        part = getattr(config, name, None) if isinstance(value, dict) else None
        for target, changes in [(part, value)] if part is not None else [(config, {name: value})]:
            for key, new in changes.items():
                setattr(target, key, new)
    model = transformers.AutoModelForMultimodalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # Gemma 3's projection begins at 0, as if there were no pictures
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def save_vision_folder(path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint as `from_pretrained` reads it, tokenizer, processor and chat template with it."""
    return save_folder(path, VISION_MODELS[family], lambda: make_vision_model(family, dtype))


def save_folder(path: Path, recipe: VisionRecipe, make: Callable[[], Any]) -> Path:
    """The same, of a model that `make` makes."""
    save_checkpoint_folder(path)  # its weights are written over
    for file in path.glob("*.safetensors"):
        file.unlink()
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    names = [recipe.tokens.get(token, f"<spare{token}>") for token in range(len(fast), max(recipe.tokens) + 1)]
    fast.add_tokens(names, special_tokens=True)
    assert all(fast.convert_tokens_to_ids(name) == token for token, name in recipe.tokens.items())
    if recipe.bos:
        fast.bos_token = recipe.bos
    fast.chat_template = (
        recipe.template.replace("PLACE", recipe.place).replace("SOUND", recipe.sound).replace("FILM", recipe.video)
    )
    fast.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = recipe.named
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    processor = recipe.processor(tokenizer)
    processor.chat_template = None
    processor.save_pretrained(path)
    tokenizer.save_pretrained(path)
    make().save_pretrained(path)
    return path
