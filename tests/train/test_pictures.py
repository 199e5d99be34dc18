"""Training with pictures: packed or padded, many jobs, against each document alone in transformers and PEFT, against
TRL's collator, and against itself stopped and resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.errors import ModelError
from lowrank.media.processor import processor_of
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.layers import Parts, is_outside, language_model
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.models.own_masks import FULL, SLIDING
from lowrank.segments import Segment
from tests.media_oracle import alone_loss
from tests.media_rows import segments_in, write_conversations
from tests.peft_oracle import peft_twin, types_of
from tests.picture_rows import real_or_made
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_vision_models import (
    VISION_MODELS,
    VOCABULARY,
    as_parameters,
    make_model,
    make_vision_model,
    save_folder,
    save_vision_folder,
)

PADDED = {"qwen3_5"}
"""Linear attention."""
FLOAT32_INSIDE = {"gemma3", "gemma4", "qwen3_5", "paligemma"}
REPRESENTATIVE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "paligemma")
families = pytest.mark.parametrize("family", as_parameters(VISION_MODELS, REPRESENTATIVE))


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_or_made(request, tmp_path_factory.mktemp("rows"))


def vision_base(path: Path, family: str, dtype: str = "float64", **settings: Any) -> Any:
    """(the base, its tokenizer, what was said)."""
    save_vision_folder(path, family, getattr(torch, dtype))
    return base_of(path, dtype, **settings)


def base_of(path: Path, dtype: Any, **settings: Any) -> Any:
    """The same, of a checkpoint that is there."""
    config = ModelConfig(path=str(path), dtype=dtype, device="cpu", **settings)
    tokenizer = load_tokenizer(config)
    base = load(config, tokenizer=tokenizer, notify=lambda _: None)
    processor = processor_of(tokenizer)
    assert processor is not None
    return base, tokenizer, give_media_encoder(base, processor, config.attention)


def segments_of(path: Path, tokenizer: Any) -> list[Segment]:
    """Of LLaMA-Factory's demonstration: six conversations with one or two pictures, and a question without any."""
    segments = segments_in(tokenizer, path)
    first = segments[0]
    assert first.media is not None
    end = first.media.spans[-1][1] + 1
    return [*segments, replace(first, token_L=first.token_L[end:], weight_L=first.weight_L[end:], media=None)]


@families
def test_jobs_learn_what_peft_learns_from_each_document_alone(family: str, tmp_path: Path, rows: Path) -> None:
    base, tokenizer, notice = vision_base(tmp_path, family)
    assert base.layout == ("padded" if family in PADDED else "packed")
    assert notice is None
    assert base.media_encoder.both_ways == ({FULL, SLIDING} if family == "gemma3" else set())
    assert_as_peft(base, segments_of(rows, tokenizer), lambda: make_vision_model(family, torch.float64))


def test_gemma_4_may_read_pictures_both_ways(tmp_path: Path, rows: Path) -> None:
    """The larger ones do, in the layers with windows alone."""
    recipe = replace(
        VISION_MODELS["gemma4"],
        config={"text_config": {"vocab_size_per_layer_input": VOCABULARY, "use_bidirectional_attention": "vision"}},
    )
    save_folder(tmp_path, recipe, lambda: make_model("gemma4", recipe, torch.float64))
    base, tokenizer, notice = base_of(tmp_path, "float64")
    assert (base.layout, notice) == ("packed", None)
    assert base.media_encoder.both_ways == {SLIDING}
    assert_as_peft(base, segments_of(rows, tokenizer), lambda: make_model("gemma4", recipe, torch.float64))


def assert_as_peft(base: Any, segments: list[Segment], make: Callable[[], Any]) -> None:
    """Two jobs together, each as PEFT on each of its documents alone."""
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=4, alpha=8), micro_batch_tokens=700)
    work = {slots[0]: [segments[1], segments[4]], slots[1]: [segments[0], segments[-1], segments[5], segments[2]]}
    for slot in slots:
        pretend_learned(engine, slot, seed=slot)
    forwarded = engine.forward_backward(work)
    language, _ = language_model(base.model)
    for slot, rank, alpha in zip(slots, (2, 4), (4, 8)):
        ours = engine.bank.parameters(slot)
        targets = sorted({name.partition(".lora_")[0] for name in ours})
        assert not [name for name in targets if is_outside(name, language)]
        twin, theirs = peft_twin(
            make(), ours, r=rank, lora_alpha=engine.bank.slots[slot].config.alpha or alpha,
            target_modules="|".join(targets).replace(".", r"\."),
        )  # fmt: skip
        loss = alone_loss(twin, base, work[slot])
        loss.backward()
        tolerance = 1e-5 if base.model.config.model_type in FLOAT32_INSIDE else 1e-9
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        for name, parameter in ours.items():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=tolerance)


def test_the_forward_passes_can_be_cut_and_a_job_does_not_see_another(tmp_path: Path, rows: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "qwen3_vl")
    segments = segments_of(rows, tokenizer)
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=2))
    alone = engine.forward_backward({slots[0]: segments[:3]})[slots[0]].loss
    engine.micro_batch_tokens = 200
    assert engine.forward_backward({slots[0]: segments[:3]})[slots[0]].loss == pytest.approx(alone, abs=1e-12)
    together = engine.forward_backward({slots[0]: segments[:3], slots[1]: segments[3:]})
    assert together[slots[0]].loss == pytest.approx(alone, abs=1e-12)
    assert engine.evaluate({slots[0]: segments[:3]})[slots[0]].loss == pytest.approx(alone, abs=1e-12)


def test_a_cut_document_sees_the_pictures_that_are_left(tmp_path: Path, rows: Path) -> None:
    """LLaVA-OneVision cuts a picture in tiles only where it is alone, so the whole document decides."""
    from lowrank.data.chat.truncation import split, truncate

    base, tokenizer, _ = vision_base(tmp_path, "llava_onevision")
    (first, *_) = segments_of(rows, tokenizer)
    assert first.media is not None
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    cut, _ = truncate(first, first.media.spans[1][0] + 2)
    assert cut is not None
    assert cut.media is not None
    assert len(cut.media.spans) == 1
    whole, part = engine.logprobs(slot, [first]), engine.logprobs(slot, [cut])
    both = cut.weight_L > 0
    torch.testing.assert_close(torch.from_numpy(whole[0][: len(cut)][both]), torch.from_numpy(part[0][both]))
    pieces = split(first, first.media.spans[1][0] + 1, first.token_L[:0])
    assert [piece.media.before for piece in pieces if piece.media] == [0, 1]
    engine.forward_backward({slot: pieces})


def test_a_base_that_mixes_documents_up_is_told_and_never_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose pictures are read both ways, where nobody knows it."""
    monkeypatch.setattr("lowrank.models.media_encoder.layers_both_ways", lambda model, kind: frozenset())
    with pytest.raises(ModelError, match="cannot be given pictures in the packed layout: a document with a pict"):
        vision_base(tmp_path, "gemma3", attention="packed")
    base, _, notice = vision_base(tmp_path, "gemma3")
    assert base.layout == "padded"
    assert "one document per padded row" in notice


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_groups_of_tokens_are_not_made_of_such_pictures(family: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="shift_attn"):
        vision_base(tmp_path, family, shift_attn=8)


def test_other_pictures_are_other_references(tmp_path: Path, rows: Path) -> None:
    from lowrank.train.reference import References

    base, tokenizer, _ = vision_base(tmp_path, "llava")
    one = segments_of(rows, tokenizer)[1]
    engine, _ = make_engine(base, LoraConfig(rank=2))
    assert one.media is not None
    other = replace(one, media=replace(one.media, items=segments_of(rows, tokenizer)[2].media.items))  # type: ignore[union-attr]  # fmt: skip
    assert (one.token_L == other.token_L).all()
    references = References(engine, tmp_path / "kept")
    references.prepare([one, other])
    assert references.num_computed == 2
    first, second = references.attach([one, other])
    assert (first.reference_L != second.reference_L).any()
    again = References(engine, tmp_path / "kept")
    again.prepare([one, other])
    assert (again.num_computed, again.num_found) == (0, 2)


@families
def test_each_job_has_its_own_tower(family: str, tmp_path: Path, rows: Path) -> None:
    """Adapters on language model, projector and tower, of two jobs in the same passes: as PEFT's on each alone."""
    base, tokenizer, _ = vision_base(tmp_path, family)
    segments = segments_of(rows, tokenizer)
    everywhere: Any = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    engine, slots = make_engine(
        base, LoraConfig(rank=2, **everywhere), LoraConfig(rank=4, alpha=8, freeze_language_model=True, **everywhere)
    )
    parts = Parts(base.model)
    reached = [{parts.of(name) for name in engine.bank.slots[slot].ranks} for slot in slots]
    beside = {"vision_tower"} if family == "gemma3" else {"vision_tower", "multi_modal_projector"}
    assert reached == [{"language_model"} | beside, beside]
    work = {slots[0]: [segments[1], segments[4]], slots[1]: [segments[0], segments[-1], segments[5]]}
    for slot in slots:
        pretend_learned(engine, slot, seed=slot)
    forwarded = engine.forward_backward(work)
    for slot, rank, alpha in zip(slots, (2, 4), (4, 8)):
        ours = engine.bank.parameters(slot)
        targets = sorted({name.partition(".lora_")[0] for name in ours})
        twin, theirs = peft_twin(
            make_vision_model(family, torch.float64), ours, r=rank,
            lora_alpha=engine.bank.slots[slot].config.alpha or alpha,
            target_modules="|".join(targets).replace(".", r"\."),
        )  # fmt: skip
        loss = alone_loss(twin, base, work[slot])
        loss.backward()
        tolerance = 1e-5 if family in FLOAT32_INSIDE else 1e-9
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        unused = 0
        for name, parameter in ours.items():
            if theirs[name].grad is None:  # LLaVA's last layer, whose output nobody reads
                unused += 1
                assert parameter.grad is None or not parameter.grad.any()
                continue
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=tolerance)
        assert unused < len(ours) / 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "idefics3"])
def test_a_tower_is_computed_again_to_the_same_bits(family: str, tmp_path: Path, rows: Path) -> None:
    """Each document's layers with the adapters of its own slot; of the first n layers, those of the language model."""
    base, tokenizer, _ = vision_base(tmp_path, family)
    everywhere = LoraConfig(rank=2, dropout=0.5, freeze_vision_tower=False, freeze_multi_modal_projector=False)
    engine, slots = make_engine(base, everywhere, everywhere)
    for slot in slots:
        pretend_learned(engine, slot, seed=slot)
    segments, seen = segments_of(rows, tokenizer), {}
    for policy in ("none", "full", "selective", "sqrt", 1):
        set_activation_checkpointing(base.model, policy)
        engine.forward_backward({slots[0]: segments[:2], slots[1]: segments[2:4]})
        own = {(slot, name): each for slot in slots for name, each in engine.bank.parameters(slot).items()}
        seen[policy] = {name: each.grad.clone() for name, each in own.items() if each.grad is not None}
        for each in own.values():
            each.grad = None
    assert any("visual" in name or "vision" in name for _, name in seen["none"])
    for policy, gradients in seen.items():
        assert gradients.keys() == seen["none"].keys(), policy
        assert all(torch.equal(each, seen["none"][name]) for name, each in gradients.items()), policy


def test_a_job_without_pictures_leaves_its_tower_as_it_is(tmp_path: Path, rows: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "llava")
    engine, (slot, other) = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=2, freeze_vision_tower=False))
    segments = segments_of(rows, tokenizer)
    engine.forward_backward({slot: segments[:1], other: segments[-1:]})
    assert all(
        parameter.grad is None or not parameter.grad.any()
        for name, parameter in engine.bank.parameters(other).items()
        if "vision_tower" in name
    )
    engine.optim_step(other, 1e-2)


def test_dropout_in_the_tower_does_not_depend_on_how_a_step_is_cut(tmp_path: Path, rows: Path) -> None:
    base, tokenizer, _ = vision_base(tmp_path, "qwen3_vl")
    engine, (slot,) = make_engine(base, LoraConfig(rank=2, dropout=0.5, freeze_vision_tower=False))
    pretend_learned(engine, slot, seed=1, std=0.3)
    segments = segments_of(rows, tokenizer)[:3]
    whole = engine.forward_backward({slot: segments})[slot].loss
    before = {name: each.grad.clone() for name, each in engine.bank.parameters(slot).items() if each.grad is not None}
    for parameter in engine.bank.parameters(slot).values():
        parameter.grad = None
    engine.micro_batch_tokens = 200
    assert engine.forward_backward({slot: segments})[slot].loss == pytest.approx(whole, abs=1e-12)
    for name, gradient in before.items():
        torch.testing.assert_close(engine.bank.parameters(slot)[name].grad, gradient, rtol=0, atol=1e-12)
    assert any("visual" in name and gradient.any() for name, gradient in before.items())
    assert engine.evaluate({slot: segments})[slot].loss != pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3_vl", "paligemma"])
def test_preferences_about_pictures(family: str, tmp_path: Path, rows: Path) -> None:
    """Both answers see the picture of their question: as log-probabilities of each document alone."""
    from lowrank.data.config import SourceConfig
    from lowrank.objectives.dpo import DPOConfig
    from lowrank.records import Preference
    from lowrank.train.optimizers.adamw import AdamWConfig
    from lowrank.train.reference import References

    base, tokenizer, _ = vision_base(tmp_path / "m", family)
    picture = json.loads(rows.read_text())[1]["images"][0]
    pair = {"prompt": "<image>Who?", "chosen": "A player.", "rejected": "Nobody.", "images": [picture]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(pair) + "\n")
    config = DataConfig(train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False)
    step = prepare(config, tokenizer=tokenizer, record=Preference, seed=0).train.next_step()
    engine, _ = make_engine(base)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, DPOConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    references = References(engine, None)
    references.prepare(step)
    forwarded = engine.forward_backward({slot: references.attach(step)})
    assert forwarded[slot].loss == pytest.approx(math.log(2), abs=1e-6)  # an adapter that has learned nothing
    with_pictures = engine.logprobs(-1, step)
    alone = [engine.logprobs(-1, [each])[0] for each in step]
    for one, other in zip(with_pictures, alone):
        assert np.abs(one - other).max() < 1e-5


def test_rated_answers_about_pictures(tmp_path: Path, rows: Path) -> None:
    """KTO by its definition, of log-probabilities of each document alone by transformers and PEFT: prompts that other
    rows' answers are put behind keep their own pictures."""
    from lowrank.data.config import SourceConfig
    from lowrank.objectives.kto import KTOConfig
    from lowrank.records import Rated
    from lowrank.segments import MISMATCHED, REJECTED
    from lowrank.train.optimizers.adamw import AdamWConfig
    from lowrank.train.reference import References

    base, tokenizer, _ = vision_base(tmp_path / "m", "qwen3_vl")
    pictures = [row["images"][0] for row in json.loads(rows.read_text("utf-8"))[:3]]
    path = tmp_path / "rated.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "<image>Who?"}, {"role": "assistant", "content": answer}],
         "label": label, "images": [picture]}
        for answer, label, picture in zip(("A player.", "Nobody.", "Two of them."), (True, False, True), pictures)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(
        train=(SourceConfig(path=str(path), media_dir=str(rows.parent)),), shuffle=False, batch_size=3, max_length=2048
    )
    step = prepare(config, tokenizer=tokenizer, record=Rated, seed=0, mismatched=True).train.next_step()
    assert [each.role == MISMATCHED for each in step] == [False, True] * 3
    assert all(each.media is not None and each.media == step[place & ~1].media for place, each in enumerate(step))
    engine, _ = make_engine(base)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, KTOConfig(beta=0.5).build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    pretend_learned(engine, slot, seed=1)
    references = References(engine, None)
    references.prepare(step)
    forwarded = engine.forward_backward({slot: references.attach(step)})
    ours = engine.bank.parameters(slot)
    targets = sorted({name.partition(".lora_")[0] for name in ours})
    twin, theirs = peft_twin(
        make_vision_model("qwen3_vl", torch.float64), ours, r=2, lora_alpha=engine.bank.slots[slot].config.alpha or 4,
        target_modules="|".join(targets).replace(".", r"\."),
    )  # fmt: skip

    def ratio(segment: Segment) -> torch.Tensor:
        total = float(segment.weight_L.sum())
        with twin.disable_adapter(), torch.no_grad():
            before = alone_loss(twin, base, [segment])
        return (before - alone_loss(twin, base, [segment])) * total

    with torch.no_grad():
        kl = max(0.0, float(sum(ratio(each) for each in step if each.role == MISMATCHED) / 3))
    loss = torch.zeros((), dtype=torch.float64)
    for each in step:
        if each.role != MISMATCHED:
            sign = -1.0 if each.role == REJECTED else 1.0
            loss = loss + (1 - torch.sigmoid(0.5 * sign * (ratio(each) - kl))) / 3
    loss.backward()
    assert forwarded[slot].loss == pytest.approx(loss.item(), abs=1e-6)  # references are float32
    for name, parameter in ours.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=1e-6)


def test_the_same_words_about_another_picture_are_another_question(tmp_path: Path, rows: Path) -> None:
    from lowrank.data.batching.mismatched import with_mismatched

    _, tokenizer, _ = vision_base(tmp_path, "llava")
    first, one, other, *_ = segments_of(rows, tokenizer)
    assert one.media is not None
    assert other.media is not None
    question = replace(one, media=replace(one.media, items=other.media.items))
    made = list(with_mismatched([(first,), (one,), (question,)], 4096))
    answer_L = one.token_L[int(np.flatnonzero(one.weight_L)[0]) :]
    assert (made[2][1].token_L[-len(answer_L) :] == answer_L).all(), "the nearest row before"


@pytest.mark.slow  # importing TRL takes most of its ten seconds
def test_ids_and_labels_are_those_of_trls_collator(tmp_path: Path, rows: Path) -> None:
    """But for the placeholders: TRL too learns the answers alone where the template marks them."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    base, tokenizer, _ = vision_base(tmp_path, "qwen2_5_vl")
    tokenizer.chat_template = MARKED
    processor = base.media_encoder.processor.own
    processor.chat_template = MARKED
    collator = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for segment, row in zip(segments_of(rows, tokenizer), json.loads(rows.read_text("utf-8"))):
        turns = [{"role": turn["role"], "content": in_parts(turn["content"])} for turn in row["messages"]]
        images = [Image.open(rows.parent / name) for name in row["images"]]
        theirs = collator([{"messages": turns, "images": images}])
        length = len(segment)
        assert theirs["input_ids"][0, :length].tolist() == segment.token_L.tolist()
        learned = (theirs["labels"][0] != -100).tolist()
        assert learned[:length] == (segment.weight_L > 0).tolist()
        assert not any(learned[length:])


def test_a_prompt_is_what_paligemmas_processor_says(tmp_path: Path, rows: Path) -> None:
    """Ids, types and labels that it makes of prompt and suffix, and the loss that transformers makes of these."""
    base, tokenizer, _ = vision_base(tmp_path / "m", "paligemma")
    tokenizer.add_bos_token = True
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    processor = base.media_encoder.processor
    processor.__dict__.pop("own")  # made anew, it lets the tokenizer go on as it was
    assert processor.own.tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    with Image.open(rows.parent / json.loads(rows.read_text("utf-8"))[1]["images"][0]) as picture:
        picture.save(tmp_path / "it.png")
    turns = [("<image>answer en What is it?", "a cat"), ("What differs <image>here<image>?", "nothing <loc0000>")]
    talks = [(["it.png"] * prompt.count("<image>"), [(prompt, suffix)]) for prompt, suffix in turns]
    segments = segments_in(tokenizer, write_conversations(tmp_path / "rows.json", "images", talks))
    tokenizer.add_bos_token = False  # as its own class does, for good
    engine, (slot,) = make_engine(base, LoraConfig(rank=2))
    model = make_vision_model("paligemma", torch.float64)
    for segment, (prompt, suffix) in zip(segments, turns):
        images = [Image.open(tmp_path / "it.png")] * prompt.count("<image>")
        text = "<image>" * len(images) + prompt.replace("<image>", "")
        theirs = processor.own(text=[text], images=[images], suffix=[suffix], return_tensors="pt")
        assert theirs["input_ids"][0].tolist() == segment.token_L.tolist()
        assert theirs["token_type_ids"].tolist() == types_of(segment).tolist()
        assert (theirs["labels"][0] != -100).tolist() == (segment.weight_L > 0).tolist()
        theirs["pixel_values"] = theirs["pixel_values"].to(base.dtype)
        assert engine.evaluate({slot: [segment]})[slot].loss == pytest.approx(model(**theirs).loss.item(), abs=1e-5)


def in_parts(text: str) -> list[dict[str, Any]]:
    first, *others = text.split("<image>")
    parts = [{"type": "text", "text": first}] if first else []
    for other in others:
        parts += [{"type": "image"}, *([{"type": "text", "text": other}] if other else [])]
    return parts


MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% elif message['content'] is string %}{{ message['content'] + '<|im_end|>\n' }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen's, with the marks that say what the assistant wrote."""
