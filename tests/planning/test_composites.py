"""Plans of models with towers for pictures or sound: the tower is weights, and of the language model's layers some are
counted for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.config import ModelConfig
from lowrank.models.storages.nf4 import NF4Config
from lowrank.planning.memory import StepMemory
from tests.planning.test_memory import measured, planned
from tests.tiny_composites import COMPOSITES


@pytest.mark.parametrize(
    ("family", "storage"),
    [
        ("llava", None),
        pytest.param("gemma3", NF4Config(), marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", None, marks=pytest.mark.slow),
    ],
    ids=["llava", "gemma3 nf4", "qwen2_5_vl"],
)
def test_a_simulated_step_is_a_real_step(family: str, storage: NF4Config | None, tmp_path: Path) -> None:
    config = COMPOSITES[family]()
    text = config.get_text_config()
    text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.head_dim = 8, 128, 256, 32
    text.layer_types = ["sliding_attention", "full_attention"] * 4 if family == "gemma3" else None
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 4, 8]}
    for name in ("out_hidden_size", "projection_dim"):
        if hasattr(config.vision_config, name) and family != "llava":
            setattr(config.vision_config, name, 128)
    config.architectures = None
    config.save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), dtype="bfloat16", device="cpu")
    settings = settings.model_copy(update={"storage": storage}) if storage else settings
    jobs = planned(LoraConfig(rank=4), LoraConfig(rank=8))
    memory = StepMemory(settings, jobs)
    assert memory.num_layers == 8
    first, others = memory.cores()
    assert first is not None
    assert len(first) + len(others) < 6
    static, peak = measured(settings, jobs, 4096, "none")
    step = memory.step(4096, "none")
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)
