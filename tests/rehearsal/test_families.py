"""One step of every family, packed or padded, mixtures too, and of pictures, on tensors that say cuda:0."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.segments import Segment
from tests.media_rows import segments_in
from tests.models.test_packed_experts import BOTH, packed_base
from tests.picture_rows import write_picture_rows
from tests.rehearsal.fake_gpu import move, on_gpu
from tests.rehearsal.test_steps import LENGTHS, engine_of, unlisted
from tests.tiny_models import FAMILIES, VOCABULARY, make_model, random_step
from tests.tiny_vision_models import save_vision_folder

NOT_HERE = {"falcon": "whether its layers are linear ones is told by what they compute"}
OF_EXPERTS = {"models/fused_experts.py:counted_rows reads a list": 4}
"""Rows of each expert and slot, for its products: once for each of two layers, and when they are computed again."""
OF_PICTURES = {"models/base.py:Base._call reads a number": 1}
"""transformers counts the places of pictures in each forward pass."""


def waits_of(base: Base, adapters: list[Any], work: dict[int, list[Segment]]) -> Counter[str]:
    """Of a step of the jobs, whose layers are computed again in the backward pass."""
    with on_gpu():
        engine = engine_of(base, adapters)
    with on_gpu() as watch:
        set_activation_checkpointing(base.model, "full")
        engine.forward_backward(work)
        gradients = [p.grad for job in engine.jobs.values() for p in job.parameters.values()]
        found = [grad for grad in gradients if grad is not None]
        assert len(found) > len(gradients) / 2, "LLaVA reads no output of its tower's last layer"
        assert all(grad.is_cuda for grad in found)
        for slot in engine.jobs:
            assert not engine.optim_step(slot, 1e-3).skipped
    return watch.found


def steps() -> dict[int, list[Segment]]:
    return {slot: random_step(slot, LENGTHS, VOCABULARY) for slot in range(2)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step(family: str) -> None:
    if family in NOT_HERE:
        pytest.skip(NOT_HERE[family])
    model = make_model(family, torch.bfloat16)
    use_memory_efficient_modules(model)
    base = Base(model, None, family)
    choose_layout(base, "auto")
    move(model)
    assert not unlisted(waits_of(base, [LoraConfig(rank=8), LoraConfig(rank=4)], steps()), 2)


@pytest.mark.parametrize("storage", ["dense", "nf4"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_adapters_of_experts(family: str, storage: str) -> None:
    if storage == "dense":
        base = Base(make_model(family, torch.bfloat16), None, family)
        choose_layout(base, "auto")
    else:
        base = packed_base(family, storage, torch.bfloat16)
    move(base.model)
    on_experts = LoraConfig(rank=4, target_modules=("o_proj",), target_parameters=BOTH)
    found = waits_of(base, [on_experts, LoraConfig(rank=2)], steps())
    assert not unlisted(found - Counter(OF_EXPERTS), 2)


@pytest.mark.parametrize("family", ["gemma3", "llava", "paligemma", "internvl"])
def test_pictures(family: str, tmp_path: Path) -> None:
    """Adapters on the language model alone, and on projector and tower too. Of others (Qwen's, Idefics3,
    LLaVA-OneVision) shapes within the tower are numbers on the card."""
    folder, rows = save_vision_folder(tmp_path / "model", family), write_picture_rows(tmp_path)
    config = ModelConfig(path=str(folder), dtype="bfloat16", device="cpu", image_max_pixels=64 * 64)
    tokenizer = load_tokenizer(config)
    base, processor = load(config, tokenizer=tokenizer, notify=lambda _: None), processor_of(tokenizer)
    assert processor is not None
    give_media_encoder(base, processor, "auto")
    segments = segments_in(tokenizer, rows)
    move(base.model)
    everywhere = LoraConfig(rank=4, freeze_vision_tower=False, freeze_multi_modal_projector=False)
    found = waits_of(base, [everywhere, LoraConfig(rank=2)], {0: segments[:2], 1: segments[2:4]})
    assert not unlisted(found - Counter(OF_PICTURES), 2)
