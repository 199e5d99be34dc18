"""Models that read a prompt both ways and its answer from left to right: found out when they load, packed and padded as
each document alone in transformers, refused where they cannot be told what is prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.paligemma import modeling_paligemma

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT, pack
from lowrank.errors import ModelError
from lowrank.evaluate.likelihood import continuation_logprobs
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.models.attention import packed as attention
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout, shares_prompts
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.native_masks import prompt_type_of
from lowrank.objectives.dpo import DPOConfig
from lowrank.segments import Segment
from lowrank.train.scoring import ScoringEngine
from tests.models.test_composites import loaded
from tests.models.test_prefix_sharing import engine_of, gradients, pairs, reference
from tests.peft_oracle import peft_twin, plain_loss
from tests.tiny_composites import make_composite, save_composite_folder
from tests.tiny_models import FAMILIES, make_base, make_engine, make_model, random_step, tiny

HRM = tiny("HrmTextConfig", head_dim=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_composite_folder(tmp_path_factory.mktemp("paligemma") / "model", "paligemma")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return loaded(folder)


def answered(seed: int, prompts: list[int], lengths: list[int]) -> list[Segment]:
    """Documents whose tokens behind the prompt are learned; none of one that is a prompt alone."""
    segments = random_step(seed, lengths)
    learned = [np.float32(np.arange(length) >= prompt) for prompt, length in zip(prompts, lengths)]
    return [replace(each, weight_L=own) for each, own in zip(segments, learned)]


@pytest.mark.parametrize(
    ("family", "layout"), [("paligemma", "packed"), ("paligemma", "padded"), ("paligemma2", "packed")]
)
def test_each_document_as_alone(family: str, layout: str) -> None:
    """Longer than the window of PaliGemma 2, which answers alone know."""
    base = Base(make_composite(family, torch.float64), None, family)
    choose_layout(base, layout)
    assert (base.layout, base.prompt_type) == (layout, 0)
    segments = answered(0, [6, 1, 9, 11], [14, 8, 9, 40])
    hidden_TD = base.hidden(pack([(BASE_SLOT, each) for each in segments]))
    whole = make_composite(family, torch.float64)
    for segment, own_LD in zip(segments, hidden_TD.split([len(each) for each in segments])):
        types = (np.arange(len(segment)) >= segment.prompt_length).astype(np.int64)
        given = {"input_ids": segment.token_L, "attention_mask": np.ones(len(segment), int), "token_type_ids": types}
        with torch.no_grad():
            wanted = whole.model(**{name: torch.from_numpy(value)[None] for name, value in given.items()})
        torch.testing.assert_close(own_LD, wanted.last_hidden_state[0], rtol=0, atol=1e-5)


def test_it_is_said_what_is_prompt(folder: Path) -> None:
    notices: list[str] = []
    load(ModelConfig(path=str(folder), device="cpu", dtype="float32"), notify=notices.append)
    assert any("a prefix language model: what comes before the first token that is learned" in each for each in notices)
    with pytest.raises(ModelError, match=r"model\.shift_attn: this base reads prompts both ways"):
        loaded(folder, "float32", shift_attn=4)


def test_a_text_model_may_name_its_prompts_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """HRM-Text's are of type 1, where Gemma 3's pictures are. Its layers run several times, not all with a graph."""
    monkeypatch.setitem(FAMILIES, "hrm_text", HRM)
    base = make_base("hrm_text")
    assert (base.layout, base.prompt_type, prompt_type_of(base.model)) == ("packed", 1, 1)
    engine, (slot,) = make_engine(base, LoraConfig(rank=4, alpha=8))
    segments, ours = answered(0, [6, 1, 9], [14, 8, 20]), engine.bank.parameters(slot)
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    twin, theirs = peft_twin(make_model("hrm_text"), ours, r=4, lora_alpha=8, target_modules=targets)
    loss = plain_loss(twin, segments, prompt_type=1)
    loss.backward()
    assert engine.forward_backward({slot: segments})[slot].loss == pytest.approx(loss.item(), abs=1e-9)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-9)
    for family in ("gpt2", "llama"):
        assert make_base(family).prompt_type is None


def broken_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' masks, as if every token were of the prompt."""
    own = modeling_paligemma.create_causal_mask

    def create(**settings: Any) -> Any:
        if settings.get("block_sequence_ids") is not None:
            settings["block_sequence_ids"] = torch.zeros_like(settings["block_sequence_ids"])
        return own(**settings)

    monkeypatch.setattr(modeling_paligemma, "create_causal_mask", create)


def test_one_that_cannot_be_told_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_causality(monkeypatch)
    with pytest.raises(ModelError, match="cannot be told where a prompt ends"):
        loaded(folder)


@pytest.mark.parametrize("seen", ["nothing more", "everything"])
def test_masks_of_ours_that_are_others_are_found(seen: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def within(prompts: Any, length: int, device: Any) -> torch.Tensor:
        return torch.full((len(prompts), 1, length, length), seen == "everything")

    monkeypatch.setattr(attention, "_within_prompts", within)
    assert loaded(folder).layout == "padded"
    with pytest.raises(ModelError, match="cannot run packed: a document gives another result than alone"):
        loaded(folder, attention="packed")


def test_pairs_share_a_prompt_that_is_read_both_ways(base: Base) -> None:
    assert shares_prompts(base)
    engine, slot = engine_of(base, DPOConfig().build())
    segments = reference(pairs())
    loss, _, gradient = gradients(engine, slot, segments)
    engine.shares_prompts = True
    assert sum(each.num_tokens for each in engine.micro_batches({slot: segments})) < sum(map(len, segments))
    shared_loss, _, shared_gradient = gradients(engine, slot, segments)
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    assert (shared_gradient - gradient).norm() <= 1e-5 * gradient.norm()  # norms are in float32


def test_other_prompts_are_not_shared() -> None:
    """The same tokens, of which one document has asked with more."""
    from lowrank.models.attention.prefix_sharing import tail_of

    whole, other, *_ = pairs()
    assert tail_of(other, whole).prefix == 11
    assert tail_of(replace(other, prompt=9), whole).prefix == 0
    cut = tail_of(replace(other, prompt=12), whole)
    assert (cut.prefix, cut.prompt) == (11, 1)


def test_answers_are_those_of_transformers(base: Base) -> None:
    """Questions of several lengths in one batch, also beside an adapter; scores of answers are those of training."""
    bank = Bank(base)
    generator = Generator(base, bank)
    assert generator.notice is not None
    assert "it reads a question both ways" in generator.notice
    questions = [each.token_L for each in random_step(0, [5, 11, 3])]
    going = [generator.submit(Prompt(each), GenerationConfig(max_new_tokens=6)) for each in questions]
    while generator.step():
        pass
    whole = make_composite("paligemma", torch.float64)
    for question_L, generation in zip(questions, going):
        token_1L = torch.from_numpy(question_L)[None]
        made = whole.generate(
            input_ids=token_1L, attention_mask=torch.ones_like(token_1L), token_type_ids=torch.zeros_like(token_1L),
            max_new_tokens=6, do_sample=False, eos_token_id=-1,
        )  # fmt: skip
        assert generation.answer.tokens == made[0, len(question_L) :].tolist()
    answer = going[0].answer.tokens
    scored = continuation_logprobs(base, bank, [(BASE_SLOT, questions[0].tolist(), answer), (BASE_SLOT, [5], [6, 7])])
    learned = np.float32([0] * 5 + [1] * len(answer))
    segment = Segment(np.asarray([*questions[0], *answer], np.int64), learned)
    assert scored[0][0] == pytest.approx(-float(plain_loss(whole, [segment], prompt_type=0)) * len(answer), abs=1e-4)
    assert scored[0][1], "each token is the likeliest"
    engine = ScoringEngine(base, bank, 4096)
    assert engine.logprobs(BASE_SLOT, [segment])[0].sum() == pytest.approx(scored[0][0], abs=1e-4)


def test_gemma_3_is_told_of_pictures_as_before() -> None:
    base = Base(make_composite("gemma3", torch.float64), None, "gemma3")
    assert base.takes_types
    assert choose_layout(base, "auto") is None
    assert base.prompt_type is None
