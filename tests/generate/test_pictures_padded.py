"""Answers about pictures on bases whose documents with pictures do not go through packed: transformers' own `generate`,
given what each row's own tower made of its pictures."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.prompt_tuning import PromptTuningConfig
from lowrank.batches import pack
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import label_logprobs
from lowrank.generate.generator import Generator
from lowrank.generate.request import Answer, GenerationConfig, Prompt, RequestError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.media import attach_media_encoder
from lowrank.segments import Segment
from tests.generate.test_pictures import chat, pictures, whole, whole_with_logprobs
from tests.media_oracle import alone_loss
from tests.peft_oracle import peft_twin
from tests.tiny_vision_models import make_vision_model, save_vision_folder

EVERYWHERE: Any = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
REPRESENTATIVE = ("qwen3_vl",)
packed = [
    each if each in REPRESENTATIVE else pytest.param(each, marks=pytest.mark.slow)
    for each in ("qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "gemma4", "internvl", "idefics3")
]
families = pytest.mark.parametrize("family", ["gemma3", "qwen3_5", "paligemma"])


def answering(path: Path, family: str, notices: list[str] | None = None) -> Any:
    """(the base as `predict`, `chat` and `serve` have it, its tokenizer)."""
    config = ModelConfig(path=str(save_vision_folder(path, family, torch.float64)), dtype="float64", device="cpu")
    tokenizer = load_tokenizer(config)
    base = load(config, tokenizer=tokenizer, notify=lambda _: None)
    attach_media_encoder(base, "packed", (notices if notices is not None else []).append, running=True, answering=True)
    return base, tokenizer


def answers(generator: Generator, prompts: list[Prompt]) -> list[Answer]:
    config = GenerationConfig(max_new_tokens=10, logprobs=0)
    going = [generator.submit(prompt, config) for prompt in prompts]
    while generator.step():
        pass
    return [generation.answer for generation in going]


def assert_alike(one: Answer, tokens: list[int], logprobs: list[float]) -> None:
    """These families compute in float32 inside."""
    assert one.tokens == tokens
    assert one.logprobs == pytest.approx(logprobs, abs=2e-5)


def adapted(bank: Bank, **settings: Any) -> int:
    slot = bank.add(LoraConfig(rank=2, **settings), seed=0)
    for name, parameter in bank.parameters(slot).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(slot))
    bank.refresh(slot)
    return slot


def peft_of(family: str, bank: Bank, slot: int) -> Any:
    """PEFT's model of a slot."""
    ours = bank.parameters(slot)
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    expression = "|".join(targets).replace(".", r"\.")
    return peft_twin(make_vision_model(family, torch.float64), ours, r=2, lora_alpha=4, target_modules=expression)[0]


def alone(family: str, bank: Bank, slot: int) -> Any:
    """What transformers generates by: PEFT's layers in its model, or the bare one."""
    return make_vision_model(family, torch.float64) if slot < 0 else peft_of(family, bank, slot).base_model.model


def assert_each_as_alone(family: str, base: Any, bank: Bank, prompts: list[Prompt], found: list[Any]) -> None:
    """Every answer is that of transformers' model with the adapter of its slot, asked by itself."""
    for slot in dict.fromkeys(prompt.slot for prompt in prompts):
        model = alone(family, bank, slot)
        for prompt, answer in zip(prompts, found):
            if prompt.slot == slot:
                assert_alike(answer, *whole_with_logprobs(base, model, prompt, 10))


@families
def test_rows_of_many_adapters_are_answered_as_transformers_answers_each_alone(family: str, tmp_path: Path) -> None:
    notices: list[str] = []
    base, tokenizer = answering(tmp_path / "model", family, notices)
    assert base.layout == ("padded" if family == "qwen3_5" else "packed")
    assert bool(notices) == (family == "gemma3")
    one, other, third = pictures(tmp_path)
    renderer, bank = Renderer(tokenizer, DataConfig()), Bank(base)
    slots = [adapted(bank, **EVERYWHERE), adapted(bank), adapted(bank, **EVERYWHERE), -1]
    questions = [chat("Which?", third, one), chat("And this one, which is longer?", other), chat("Which?")]
    segments = [renderer.prompt_segment(question) for question in questions]
    strange = np.array([5, base.media_encoder.token, base.media_encoder.token, 9], np.int64)  # nobody's picture
    prompts = [Prompt(each.token_L, slot, each.media) for each in segments for slot in slots] + [Prompt(strange)]
    generator = Generator(base, bank)
    assert generator.image_problem is None
    found = answers(generator, prompts)
    assert_each_as_alone(family, base, bank, prompts, found)
    assert len({tuple(answer.tokens) for answer in found[:4]}) == 4, "each adapter has an answer of its own"
    for again, answer in zip(answers(generator, prompts[:2]), found):
        assert_alike(again, answer.tokens, answer.logprobs)


def test_a_trained_base_and_texts_beside_it_answer_as_before(tmp_path: Path) -> None:
    """Settled padded by training, all go in fixed batches; loaded for inference, texts have their places in steps."""
    base, tokenizer = answering(tmp_path / "model", "gemma3")
    renderer = Renderer(tokenizer, DataConfig())
    segments = [renderer.prompt_segment(each) for each in (chat("Which?", pictures(tmp_path)[0]), chat("Which?"))]
    prompts = [Prompt(each.token_L, media=each.media) for each in (segments * 2)]
    generator = Generator(base, Bank(base))
    assert generator.notice is None
    text = generator.submit(prompts[1], GenerationConfig(max_new_tokens=4))
    seeing = generator.submit(prompts[0], GenerationConfig(max_new_tokens=4))
    generator.step()
    assert (len(text.answer.tokens), len(seeing.answer.tokens)) == (1, 0)
    found = answers(generator, prompts)
    base.media_encoder.padded = False
    base.set_layout("padded")
    fixed = Generator(base, Bank(base))
    assert fixed.notice is not None
    for one, other in zip(answers(fixed, prompts), found):
        assert_alike(one, other.tokens, other.logprobs)
    theirs = base.model.generation_config  # as a checkpoint's generation_config.json has them
    theirs.eos_token_id, theirs.repetition_penalty = found[0].tokens[2], 1.5
    for one, other in zip(answers(fixed, prompts), found):
        assert_alike(one, other.tokens, other.logprobs)
    assert base.model.generation_config is theirs


@pytest.mark.parametrize("family", packed)
def test_a_packed_family_is_answered_so_where_its_cache_is_not_ours(family: str, tmp_path: Path) -> None:
    """As are questions so long that a rotary embedding would stretch."""
    base, tokenizer = answering(tmp_path / "model", family)
    one, other, third = pictures(tmp_path)
    bank = Bank(base)
    slots = [adapted(bank, **EVERYWHERE), -1]
    questions = [chat("Which?", third, one), chat("Which is it?", other), chat("Which?")]
    segments = [Renderer(tokenizer, DataConfig()).prompt_segment(question) for question in questions]
    prompts = [Prompt(each.token_L, slot, each.media) for each in segments for slot in slots]
    generator = Generator(base, bank)
    generator.notice = "for a test"
    found = answers(generator, prompts)
    assert_each_as_alone(family, base, bank, prompts, found)


def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody know that a picture's tokens see one another both ways, so that documents with one do not pack."""
    monkeypatch.setattr("lowrank.models.media_encoder.layers_both_ways", lambda model, kind: frozenset())


def test_virtual_tokens_are_not_beside_pictures_in_padded_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown(monkeypatch)
    base, tokenizer = answering(tmp_path / "model", "gemma3")
    bank = Bank(base)
    slot = bank.add(PromptTuningConfig(num_virtual_tokens=2), seed=0)
    segment = Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", pictures(tmp_path)[0]))
    with pytest.raises(
        RequestError, match="virtual tokens cannot answer here: prompts with pictures are answered in fixed"
    ):
        Generator(base, bank).submit(Prompt(segment.token_L, slot, segment.media), GenerationConfig())
    with pytest.raises(ModelError, match="virtual tokens cannot be shown media here"):
        label_logprobs(base, bank, [(slot, segment)])


def test_a_picture_that_is_gone_ends_its_own_answer_alone(tmp_path: Path) -> None:
    base, tokenizer = answering(tmp_path / "model", "gemma3")
    shown = pictures(tmp_path)
    segments = [Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", each)) for each in shown[:2]]
    generator = Generator(base, Bank(base))
    prompts = [Prompt(each.token_L, media=each.media) for each in segments]
    Path(str(shown[0].path)).unlink()
    going = [generator.submit(prompt, GenerationConfig(max_new_tokens=5)) for prompt in prompts]
    while generator.step():
        pass
    assert going[0].answer.finish == "error"
    assert going[1].answer.tokens == whole(base, make_vision_model("gemma3", torch.float64), prompts[1], 5)


@pytest.mark.parametrize("known", [True, False])
def test_labels_about_pictures_are_scored(known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In rows of their own where they do not pack, and nothing is trained then."""
    if not known:
        unknown(monkeypatch)
    base, tokenizer = answering(tmp_path / "model", "gemma3")
    bank = Bank(base)
    slot = adapted(bank, **EVERYWHERE)
    prompt = Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", pictures(tmp_path)[0]))
    weight_L = np.zeros(len(prompt.token_L), np.float32)
    weight_L[-5:] = 1
    segment = Segment(prompt.token_L, weight_L, media=prompt.media)
    text = Segment(prompt.token_L[-9:], weight_L[-9:])
    scored = label_logprobs(base, bank, [(slot, segment), (-1, text), (slot, text)])
    twin = peft_of("gemma3", bank, slot)
    for (total, number), each in zip(scored[[0, 2]], (segment, text)):
        assert -total / number == pytest.approx(alone_loss(twin, base, [each]).item(), abs=1e-5)
    with nullcontext() if known else pytest.raises(ModelError, match="loaded for inference"):
        bank.hidden(pack([(slot, segment)]), {})
