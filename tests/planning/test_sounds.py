"""What the plan counts of a step with sounds, without weights, against the same step with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.media.audio import examine_audio, made_up_wav
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.memory import StepMemory
from lowrank.planning.simulation import PlannedJob
from lowrank.segments import Media, Segment
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.planning.test_pictures import EVERYWHERE, FROZEN, assert_planned_as_measured, segment_of, slow
from tests.tiny_audio_models import AUDIO_MODELS, RATE, save_audio_folder
from tests.tiny_composites import COMPOSITES
from tests.tiny_vision_models import VOCABULARY

_TEXT = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 768, "head_dim": 32, "vocab_size": VOCABULARY}
_TOWER = {"d_model": 96, "encoder_layers": 3, "encoder_ffn_dim": 384, "output_dim": 128}
_CONFORMER = {"hidden_size": 96, "num_hidden_layers": 3, "output_proj_dims": 96}
_SECONDS = (1.6, 0.9, 1.6)


def folder_of(family: str, path: Path, dtype: str) -> ModelConfig:
    """A checkpoint folder whose weights are of another shape, with sounds so long that they show."""
    save_audio_folder(path, family)
    config = COMPOSITES[family]()
    text = config.get_text_config()
    own = dict(AUDIO_MODELS[family].config)
    tower = own.pop("audio_config")
    if not isinstance(tower, dict):
        config.audio_config = tower
        tower = _CONFORMER
    for part, values in ((text, _TEXT), (config.audio_config, {**_TOWER, **tower}), (config, own)):
        for name, value in values.items():
            if part is config or part is text or hasattr(part, name):
                setattr(part, name, value)
    text.layer_types = ["full_attention"] * 6
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 4, 8]}
    if getattr(config, "vision_config", None) is not None and hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = 128
    config.architectures = None
    config.save_pretrained(path)
    return ModelConfig(path=str(path), dtype=dtype, device="cpu")  # type: ignore[arg-type]


def step_with_sounds(processor: MediaProcessor) -> list[Segment]:
    """Documents with one sound each, and one without."""
    segments = [segment_of([], 24, None)]
    for number, seconds in enumerate(_SECONDS):
        sound = examine_audio(_wave(seconds, number), "a sound")
        (stands,) = processor.placeholders([sound])
        tokens = processor.own.tokenizer(stands, add_special_tokens=False)["input_ids"]
        segments.append(segment_of(tokens, 16, Media((sound,), ((0, len(tokens)),))))
    return segments


def _wave(seconds: float, seed: int) -> bytes:
    return made_up_wav(np.random.default_rng(seed).uniform(-0.3, 0.3, int(seconds * RATE)), RATE)


def planned(settings: ModelConfig, adapter: Any) -> StepMemory:
    processor = processor_of(load_tokenizer(settings))
    assert processor is not None
    step = step_with_sounds(processor)
    optimizer: Any = AdamWConfig()
    return StepMemory(settings, [PlannedJob(adapter, SFTConfig().build(), optimizer, step) for _ in range(2)])


@pytest.mark.parametrize(
    ("family", "adapter", "policy", "dtype"),
    [
        slow("qwen2_audio", EVERYWHERE, "none"),
        slow("qwen2_audio", FROZEN, "none"),
        slow("qwen2_audio", FROZEN, "full"),
        slow("qwen2_audio", EVERYWHERE, "full"),
        slow("qwen2_5_omni_thinker", FROZEN, "none"),
        slow("qwen2_5_omni_thinker", EVERYWHERE, "none"),
        slow("qwen2_5_omni_thinker", EVERYWHERE, "full"),
        slow("gemma4", FROZEN, "none"),
        slow("gemma4", EVERYWHERE, "full"),
    ],
)
def test_a_simulated_step_is_a_real_step(
    family: str, adapter: LoraConfig, policy: str, dtype: str, tmp_path: Path
) -> None:
    """Frozen towers and adapted ones, in one pass and in several."""
    settings = folder_of(family, tmp_path, dtype)
    memory = planned(settings, adapter)
    assert_planned_as_measured(settings, memory, (4096, 120), policy, kinds=("audio",))
