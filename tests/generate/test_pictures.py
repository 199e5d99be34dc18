"""Answers about pictures: from pages, cut anywhere, the same as transformers' own `generate`; and who is not asked."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt, RequestError
from lowrank.media.decoding import examine, read_file
from lowrank.records import Conversation, Message, Picture
from tests.peft_oracle import peft_twin
from tests.picture_rows import write_picture_rows
from tests.tiny_vision_models import as_parameters, make_vision_model
from tests.vision_bases import PADDED, vision_base

REPRESENTATIVE = ("qwen3_vl", "llava")
PACKED = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "gemma4", "internvl", "idefics3", "mistral3")
families = as_parameters(PACKED, REPRESENTATIVE)


def pictures(folder: Path) -> list[Picture]:
    write_picture_rows(folder)
    return [examine(read_file(path, ""), "", str(path)) for path in sorted((folder / "pictures").glob("*.jpg"))]


def chat(text: str, *shown: Picture) -> Conversation:
    return Conversation((Message("user", text, media=tuple((0, picture) for picture in shown)),))


def whole(base: Any, model: Any, prompt: Prompt, number: int) -> list[int]:
    """By transformers' `generate`, greedy, of the model as it is served."""
    return whole_with_logprobs(base, model, prompt, number)[0]


def whole_with_logprobs(base: Any, model: Any, prompt: Prompt, number: int) -> tuple[list[int], list[float]]:
    """The same, and the log-probability of each token."""
    token_1L = torch.from_numpy(prompt.token_L)[None]
    shown = prompt.media is not None and base.prompt_type is None  # a prompt of PaliGemma's is all 0
    seen = (token_1L == base.media_encoder.token).long() * shown
    given: dict[str, Any] = {"attention_mask": torch.ones_like(token_1L)}
    given |= {"mm_token_type_ids": seen, "token_type_ids": seen}
    if prompt.media is not None:
        inputs = base.media_encoder.processor.inputs(prompt.media.items)
        given |= {
            name: value.to(base.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if name not in ("input_ids", *given)
        }
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in given.items() if name in takes}
    with torch.no_grad():
        made = model.generate(
            input_ids=token_1L, **given, max_new_tokens=number, do_sample=False, eos_token_id=-1, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    tokens = made.sequences[0, token_1L.shape[1] :].tolist()
    logprob_LV = torch.cat(made.logits).log_softmax(-1)
    return tokens, [float(each[token]) for each, token in zip(logprob_LV, tokens)]


@pytest.mark.parametrize("family", families)
def test_answers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "model", family)
    assert family not in PADDED
    one, other, third = pictures(tmp_path)
    renderer = Renderer(tokenizer, DataConfig())
    questions = [chat("Which?", one), chat("Which?", other), chat("Which?", third, one), chat("Which?"),
                 chat("Which?", one)]  # fmt: skip
    prompts = []
    for question in questions:
        segment = renderer.prompt_segment(question)
        prompts.append(Prompt(segment.token_L, media=segment.media))
    for settings in ({}, {"max_num_batched_tokens": 7, "kv_cache_tokens": 4096}):
        generator = Generator(base, Bank(base), GeneratorConfig(**settings))  # type: ignore[arg-type]
        assert generator.notice is None
        going = [generator.submit(prompt, GenerationConfig(max_new_tokens=12)) for prompt in prompts]
        while generator.step():
            pass
        model = make_vision_model(family, torch.float64)
        for generation, prompt in zip(going, prompts):
            assert generation.answer.tokens == whole(base, model, prompt, 12)
        assert going[-1].answer.tokens == going[0].answer.tokens


def test_equal_placeholders_share_no_pages_and_adapters_answer_apart(tmp_path: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "model", "llava")
    one, other, _ = pictures(tmp_path)
    renderer = Renderer(tokenizer, DataConfig())
    bank = Bank(base)
    slot = bank.add(LoraConfig(rank=2), seed=0)
    for name, parameter in bank.parameters(slot).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    bank.refresh(slot)
    generator = Generator(base, bank)

    def answer(picture: Picture, slot: int = -1) -> Any:
        segment = renderer.prompt_segment(chat("What is to be seen here, in a few words?", picture))
        generation = generator.submit(Prompt(segment.token_L, slot, segment.media), GenerationConfig(max_new_tokens=20))
        while generator.step():
            pass
        return generation.answer

    first, second, again = answer(one), answer(other), answer(one)
    assert (first.cached_tokens, second.cached_tokens) == (0, 0)
    assert again.cached_tokens > 16
    assert first.tokens == again.tokens != answer(one, slot).tokens


def test_two_adapters_look_with_towers_of_their_own(tmp_path: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "model", "qwen3_vl")
    bank = Bank(base)
    everywhere: Any = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    slots = [bank.add(LoraConfig(rank=2, **everywhere), seed=0), bank.add(LoraConfig(rank=2), seed=0), -1]
    for slot in slots[:2]:
        for name, parameter in bank.parameters(slot).items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(slot))
        bank.refresh(slot)
    segment = Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", pictures(tmp_path)[0]))
    generator = Generator(base, bank)
    prompts = [Prompt(segment.token_L, slot, segment.media) for slot in slots]
    going = [generator.submit(prompt, GenerationConfig(max_new_tokens=12)) for prompt in prompts]
    while generator.step():
        pass
    for slot, generation in zip(slots, going):
        model = make_vision_model("qwen3_vl", torch.float64)
        if slot >= 0:
            ours = bank.parameters(slot)
            targets = sorted({name.partition(".lora_")[0] for name in ours})
            expression = "|".join(targets).replace(".", r"\.")
            model, _ = peft_twin(model, ours, r=2, lora_alpha=4, target_modules=expression)
            model = model.base_model.model
        assert generation.answer.tokens == whole(base, model, prompts[0], 12)


def test_who_cannot_be_shown_pictures_says_so(tmp_path: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path / "model", "llava")
    segment = Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", pictures(tmp_path)[0]))
    base.media_encoder = None
    with pytest.raises(RequestError, match="does not accept pictures here: it was loaded to read text alone"):
        Generator(base, Bank(base)).submit(Prompt(segment.token_L, media=segment.media), GenerationConfig())


def test_the_tokens_of_pictures_written_by_an_answer_are_tokens(tmp_path: Path) -> None:
    """Somebody's prompt of tokens, or an answer, may hold one: it takes no picture from its neighbours."""
    base, tokenizer, _ = vision_base(tmp_path / "model", "qwen3_vl")
    segment = Renderer(tokenizer, DataConfig()).prompt_segment(chat("Which?", pictures(tmp_path)[0]))
    generator = Generator(base, Bank(base))
    strange = np.array([5, base.media_encoder.token, 9, base.media_encoder.token], np.int64)
    config = GenerationConfig(max_new_tokens=8, logit_bias={base.media_encoder.token: 5.0})
    alone = generator.submit(Prompt(strange), config)
    while generator.step():
        pass
    seeing = generator.submit(Prompt(segment.token_L, media=segment.media), config)
    beside = generator.submit(Prompt(strange), config)
    while generator.step():
        pass
    assert beside.answer.tokens == alone.answer.tokens
    assert len(seeing.answer.tokens) == 8
