"""What the plan counts of a step with pictures, without weights, against the same step with weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import Batch
from lowrank.media.decoding import examine, from_pillow
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.models.config import ModelConfig
from lowrank.models.loading.model_class import model_class
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.models.media_encoder import MediaEncoder
from lowrank.models.native_masks import prompt_type_of
from lowrank.objectives.sft import SFTConfig
from lowrank.planning.capacity import largest_tokens
from lowrank.planning.changes import cut_job
from lowrank.planning.live_bytes import LiveBytes
from lowrank.planning.memory import StepMemory
from lowrank.planning.plan import Planner, describe_planned_media
from lowrank.planning.simulation import PlannedJob
from lowrank.planning.speed import calibrate
from lowrank.records import Medium
from lowrank.segments import Media, Segment
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.pixel_prefetch import PixelPrefetcher
from tests.tiny_composites import COMPOSITES
from tests.tiny_vision_models import VISION_MODELS, VOCABULARY, save_vision_folder

_TEXT = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 768, "head_dim": 32, "vocab_size": VOCABULARY}
_TOWER = {"hidden_size": 96, "intermediate_size": 192, "image_size": 64, "num_hidden_layers": 3, "depth": 3}
_TOWER |= {"out_hidden_size": 128}
_SQUARE = {"height": 64, "width": 64}
_PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"size": {"shortest_edge": 64}, "crop_size": _SQUARE}, {}),
    "gemma3": ({"size": _SQUARE}, {"image_seq_length": 64, "full_image_sequence": "\n\n<start_of_image>"
               + "<image_soft_token>" * 64 + "<end_of_image>\n\n"}),
    "idefics3": ({"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 64}}, {"image_seq_len": 64}),
    "paligemma": ({"size": _SQUARE, "image_seq_length": 256}, {"image_seq_length": 256}),
    "qwen2_5_vl": ({"size": {"shortest_edge": 64, "longest_edge": 128 * 128}}, {}),
}  # fmt: skip
"""What of a family's image processor, and of its processor, fits these towers."""
_SIZES = ((96, 64), (56, 112), (96, 64))
FROZEN = LoraConfig(rank=4)
EVERYWHERE = LoraConfig(rank=4, freeze_vision_tower=False, freeze_multi_modal_projector=False)


def folder_of(family: str, path: Path, dtype: str = "float32") -> ModelConfig:
    """A checkpoint folder whose weights are of another shape, with pictures so large that they show."""
    save_vision_folder(path, family)
    config = COMPOSITES[family]()
    text, tower = config.get_text_config(), config.vision_config
    kinds = ["sliding_attention", "full_attention"] if family == "gemma3" else ["full_attention"]
    own = {
        name: value for name, value in VISION_MODELS[family].config.items() if not isinstance(value, dict)
    }  # of the whole
    for part, values in ((text, _TEXT), (tower, _TOWER), (config, own)):
        for name, value in values.items():
            if part is not tower or hasattr(tower, name):
                setattr(part, name, value)
    text.layer_types, config.mm_tokens_per_image = kinds * (6 // len(kinds)), 64
    if "mrope_section" in text.rope_parameters:
        text.rope_parameters = {**text.rope_parameters, "mrope_section": [4, 4, 8]}
    if hasattr(config, "projection_dim"):  # PaliGemma's
        config.projection_dim = config.hidden_size = config.vision_config.projection_dim = text.hidden_size
    config.architectures = None
    config.save_pretrained(path)
    settings = ModelConfig(path=str(path), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    processor = processor_of(load_tokenizer(settings))
    assert processor is not None
    for part, values in zip((processor.own.image_processor, processor.own), _PROCESSORS[family]):
        for name, value in values.items():
            setattr(part, name, value)
    processor.own.chat_template = None
    processor.own.save_pretrained(path)
    return settings


def step_with_pictures(processor: MediaProcessor, token: int) -> list[Segment]:
    """Documents with one picture each, and one without."""
    segments = [segment_of([], 24, None)]
    for number, (width, height) in enumerate(_SIZES):
        value = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = examine(from_pillow(Image.fromarray(value)), "a picture")
        (stands,) = processor.placeholders([picture])
        tokens = processor.own.tokenizer(stands, add_special_tokens=False)["input_ids"]
        assert token in tokens
        segments.append(segment_of(tokens, 16, Media((picture,), ((0, len(tokens)),))))
    return segments


def segment_of(first: list[int], more: int, media: Media | None) -> Segment:
    token_L = np.asarray([*first, *range(10, 10 + more)], np.int64)
    weight_L = (np.arange(len(token_L)) >= len(token_L) - more + 1).astype(np.float32)
    return Segment(token_L, weight_L, media=media)


class RecordedMediaEncoder(MediaEncoder):
    """Counts pixels as well, which other threads make; these are as fast as a large model's pass lets them be."""

    live: LiveBytes
    ahead: PixelPrefetcher

    def ready(self, batch: Batch, known: Any = None) -> Batch:
        for each in self.ahead._coming.values():
            each.result()
        return super().ready(batch, known)

    def pixels(self, items: tuple[Medium, ...]) -> dict[str, torch.Tensor]:
        found = super().pixels(items)
        for each in found.values():
            self.live._see(each)
        return found


def measured(
    settings: ModelConfig,
    jobs: list[PlannedJob],
    layout: str,
    tokens: int,
    activation_checkpointing: str,
    kinds: tuple[str, ...] = ("image",),
) -> tuple[int, int]:
    """(bytes that live between steps without the optimizer, peak above them) of the real step on real tensors."""
    config = transformers.AutoConfig.from_pretrained(settings.path)
    processor = processor_of(load_tokenizer(settings))
    assert processor is not None
    live = LiveBytes()
    with live:
        model = model_class(config).from_config(config, dtype=getattr(torch, settings.dtype))
        model.eval().requires_grad_(False)
    use_memory_efficient_modules(model)
    base = Base(model, None, "m")
    base.prompt_type = prompt_type_of(model)
    base.set_layout(layout)
    base.media_encoder = media_encoder = RecordedMediaEncoder(base, processor, kinds)
    media_encoder.live = live
    with live:
        engine = Engine(base, Bank(base), tokens)
        media_encoder.ahead = engine.passes.prefetcher
        for seed, job in enumerate(jobs):
            assert job.adapter is not None
            engine.add(engine.bank.add(job.adapter, seed=seed), job.objective, job.optimizer, seed, 0.0)
    set_activation_checkpointing(model, activation_checkpointing)
    before = live.now
    work = {slot: job.step for slot, job in enumerate(jobs)}
    with live, live.phase() as phase:
        engine.forward_backward(work, next_segments=[each for step in work.values() for each in step])
    return before, phase.bytes - before


def planned(settings: ModelConfig, adapter: LoraConfig) -> StepMemory:
    processor = processor_of(load_tokenizer(settings))
    assert processor is not None
    step = step_with_pictures(processor, processor.own.tokenizer.convert_tokens_to_ids(processor.own.image_token))
    return StepMemory(settings, [PlannedJob(adapter, SFTConfig().build(), AdamWConfig(), step) for _ in range(2)])


def assert_planned_as_measured(
    settings: ModelConfig,
    memory: StepMemory,
    tokens_of_pass: tuple[int, ...],
    policy: str,
    kinds: tuple[str, ...] = ("image",),
) -> None:
    """Out of a few layers, for passes of each of these sizes."""
    first, others = memory.cores()
    assert first is not None
    assert others
    for tokens in tokens_of_pass:
        static, peak = measured(settings, list(memory.jobs), memory.layout, tokens, policy, kinds)
        found = memory.step(tokens, policy)
        assert found.base + found.adapters == pytest.approx(static, rel=0.03)
        assert 0.95 * peak < found.total - found.static < 1.1 * peak


def slow(family: str, adapter: LoraConfig, policy: str) -> Any:
    """In bfloat16, which processors without it multiply fifty times slower."""
    return pytest.param(family, adapter, policy, "bfloat16", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "adapter", "policy", "dtype"),
    [
        ("llava", FROZEN, "none", "float32"),
        slow("llava", EVERYWHERE, "full"),
        slow("llava", EVERYWHERE, "none"),
        slow("llava", FROZEN, "full"),
        slow("qwen2_5_vl", EVERYWHERE, "full"),
        slow("qwen2_5_vl", FROZEN, "none"),
        slow("qwen2_5_vl", EVERYWHERE, "none"),
        slow("qwen2_5_vl", FROZEN, "full"),
        slow("gemma3", FROZEN, "none"),
        slow("gemma3", EVERYWHERE, "full"),
        slow("idefics3", FROZEN, "full"),
        slow("idefics3", EVERYWHERE, "none"),
        slow("paligemma", FROZEN, "none"),
        slow("paligemma", EVERYWHERE, "full"),
    ],
)
def test_a_simulated_step_is_a_real_step(
    family: str, adapter: LoraConfig, policy: str, dtype: str, tmp_path: Path
) -> None:
    """Frozen towers and adapted ones, in one pass and in several."""
    settings = folder_of(family, tmp_path, dtype)
    memory = planned(settings, adapter)
    assert memory.layout == "packed"
    assert_planned_as_measured(settings, memory, (4096, 600), policy)


def test_the_plan_says_what_pictures_take(tmp_path: Path) -> None:
    memory = planned(folder_of("llava", tmp_path), FROZEN)
    plan = Planner(memory.model, memory).plan(300, "none")
    assert plan.pictures is not None
    assert (plan.pictures.number, plan.pictures.tokens, plan.pictures.tokens_of_pass) == (1, 256, 296)
    assert 500_000 < plan.pictures.tower < plan.step.base
    assert 200_000 < plan.pictures.looking < 2_000_000
    assert (
        "256 of the 296 tokens of the heaviest forward pass stand for pictures (1); the tower for"
        in describe_planned_media(plan.pictures)
    )
    assert plan.as_dict()["pictures"]["tokens"] == 256
    assert largest_tokens(Planner(memory.model, memory), plan) > 300


def test_a_speed_is_measured_with_the_tower(tmp_path: Path) -> None:
    memory = planned(folder_of("llava", tmp_path), FROZEN)
    assert calibrate(memory, Planner(memory.model, memory).plan(300, "none")).tokens_per_second > 0


def test_a_job_that_is_cut_shorter_has_the_pictures_that_are_left(tmp_path: Path) -> None:
    (job, _) = planned(folder_of("llava", tmp_path), FROZEN).jobs
    assert [len(each) for each in cut_job(job, 260).step] == [24, 260, 260, 260]
    assert [each.media is None for each in cut_job(job, 260).step] == [True, False, False, False]
