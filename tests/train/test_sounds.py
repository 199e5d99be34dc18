"""Training with sounds: many jobs in one stream, against each document alone in transformers and PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.errors import ModelError
from lowrank.media.processor import processor_of
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.embedding_hook import EmbeddingHook
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.segments import Segment
from tests.media_oracle import alone_loss
from tests.media_rows import packed_base, segments_in
from tests.peft_oracle import peft_twin
from tests.picture_rows import write_picture_rows
from tests.sound_rows import write_sound_rows
from tests.tiny_audio_models import AUDIO_MODELS, RATE, make_audio_model, save_audio_folder
from tests.tiny_models import make_engine, pretend_learned

FLOAT32_INSIDE = {"gemma4"}
TOLERANCE = {"gemma4": 2e-5}
families = pytest.mark.parametrize("family", AUDIO_MODELS)


def audio_base(path: Path, family: str, *kinds: str) -> Any:
    """(the base, its tokenizer)."""
    dtype = "float32" if family in FLOAT32_INSIDE else "float64"
    return packed_base(save_audio_folder(path, family, getattr(torch, dtype)), dtype, kinds or ("audio",))


def text_of(segment: Segment) -> Segment:
    """What comes behind its media."""
    assert segment.media is not None
    end = segment.media.spans[-1][1] + 1
    return replace(segment, token_L=segment.token_L[end:], weight_L=segment.weight_L[end:], media=None)


def drawn(engine: Any, slots: list[int], std: float = 0.1) -> None:
    """Adapters that do something."""
    for slot in slots:
        pretend_learned(engine, slot, seed=slot, std=std)


def compare_with_peft(family: str, base: Any, engine: Any, work: dict[int, list[Segment]], ranks: list[int]) -> None:
    forwarded, tolerance = engine.forward_backward(work), TOLERANCE.get(family, 1e-9)
    for slot, rank in zip(work, ranks):
        ours = engine.bank.parameters(slot)
        targets = sorted({name.partition(".lora_")[0] for name in ours})
        dtype = torch.float32 if family in FLOAT32_INSIDE else torch.float64
        twin, theirs = peft_twin(
            make_audio_model(family, dtype), ours, r=rank, lora_alpha=engine.bank.slots[slot].config.alpha or 2 * rank,
            target_modules="|".join(targets).replace(".", r"\."),
        )  # fmt: skip
        loss = alone_loss(twin, base, work[slot])
        loss.backward()
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        for name, parameter in ours.items():
            if theirs[name].grad is None:  # what looks at pictures, of which there are none
                assert "audio" not in name
                assert parameter.grad is None or not parameter.grad.any()
                continue
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=tolerance)


@families
def test_jobs_learn_what_peft_learns_from_each_document_alone(family: str, tmp_path: Path) -> None:
    base, tokenizer = audio_base(tmp_path / "m", family)
    one, two, three, four = segments_in(tokenizer, write_sound_rows(tmp_path, RATE))
    assert two.media is not None
    assert len(two.media.spans) == 2
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=4, alpha=8), micro_batch_tokens=250)
    drawn(engine, slots)
    work = {slots[0]: [one, three], slots[1]: [two, text_of(one), four]}
    compare_with_peft(family, base, engine, work, [2, 4])


@pytest.mark.parametrize("family", ["qwen2_5_omni_thinker", "gemma4"])
def test_pictures_and_sounds_in_one_document(family: str, tmp_path: Path) -> None:
    base, tokenizer = audio_base(tmp_path / "m", family, "image", "audio")
    write_picture_rows(tmp_path)
    sounds = write_sound_rows(tmp_path, RATE)
    row = {
        "messages": [
            {"role": "user", "content": "<audio>Is it <image> or<image>?<audio>"},
            {"role": "assistant", "content": "The second."},
        ],
        "images": ["pictures/1.jpg", "pictures/0.jpg"],
        "audios": ["sounds/1.wav", "sounds/2.wav"],
    }
    both = tmp_path / "both.json"
    both.write_text(json.dumps([row]), encoding="utf-8")
    mixed, *_ = segments = segments_in(tokenizer, both, tmp_path / "mllm.json", sounds)
    assert mixed.media is not None
    assert [each.kind for each in mixed.media.items] == ["audio", "image", "image", "audio"]
    engine, slots = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=2))
    drawn(engine, slots)
    work = {slots[0]: [mixed, segments[1]], slots[1]: [segments[-1], mixed]}
    compare_with_peft(family, base, engine, work, [2, 2])


@families
def test_adapters_on_what_hears(family: str, tmp_path: Path) -> None:
    """Two jobs, one of which has its own tower for sounds: as PEFT's."""
    base, tokenizer = audio_base(tmp_path / "m", family)
    one, two, three, four = segments_in(tokenizer, write_sound_rows(tmp_path, RATE))
    engine, slots = make_engine(base, LoraConfig(rank=2, freeze_vision_tower=False), LoraConfig(rank=2))
    assert any("audio_tower" in name for name in engine.bank.parameters(slots[0]))
    drawn(engine, slots)
    compare_with_peft(family, base, engine, {slots[0]: [one, two, text_of(one)], slots[1]: [three, four]}, [2, 2])


def test_what_is_cut_off_leaves_whole_sounds(tmp_path: Path) -> None:
    """The second sound of a document falls behind the end: the first alone is heard."""
    base, tokenizer = audio_base(tmp_path / "m", "qwen2_audio")
    path = write_sound_rows(tmp_path, RATE)
    whole = segments_in(tokenizer, path)[1]
    assert whole.media is not None
    end = whole.media.spans[1][0] + 2
    _, cut, *_ = segments_in(tokenizer, path, max_length=end)
    assert cut.media is not None
    assert len(cut) == end - 2
    assert (cut.media.spans, cut.media.before) == (whole.media.spans[:1], 0)
    hidden = [base.hidden(batch_of(each)) for each in (whole, cut)]
    torch.testing.assert_close(hidden[0][: len(cut)], hidden[1], rtol=0, atol=1e-12)


def batch_of(*segments: Segment) -> Any:
    from lowrank.batches import BASE_SLOT, pack

    return pack([(BASE_SLOT, each) for each in segments])


def test_another_sound_is_another_document(tmp_path: Path) -> None:
    """Of equal length, so that the tokens are the same."""
    from lowrank.train.reference import References

    base, tokenizer = audio_base(tmp_path / "m", "qwen2_audio")
    write_sound_rows(tmp_path / "a", RATE)
    one = segments_in(tokenizer, tmp_path / "a" / "audio.json")[0]
    for number in range(3):
        file = tmp_path / "a" / "sounds" / f"{number}.wav"
        data = bytearray(file.read_bytes())
        data[100:200] = bytes(100)
        file.write_bytes(bytes(data))
    other = segments_in(tokenizer, tmp_path / "a" / "audio.json")[0]
    assert (one.token_L == other.token_L).all()
    engine, _ = make_engine(base, LoraConfig(rank=2))
    references = References(engine, tmp_path / "kept")
    references.prepare([other])
    first = references.attach([other])[0]
    with pytest.raises(Exception, match="a sound has changed"):
        references.prepare([one])
    assert np.abs(first.reference_L).max() > 0


def test_a_base_that_mixes_documents_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_audio_folder(tmp_path, "qwen2_audio")
    config = ModelConfig(path=str(folder), dtype="float32", device="cpu")
    tokenizer = load_tokenizer(config)
    base = load(config, tokenizer=tokenizer, notify=lambda _: None)
    processor = processor_of(tokenizer)
    assert processor is not None
    monkeypatch.setattr(EmbeddingHook, "embeddings", lambda self, token_1L, given: torch.ones(token_1L.shape[1], 32))
    with pytest.raises(ModelError, match="cannot be trained on sounds: packed, it makes the same of different sounds"):
        give_media_encoder(base, processor, kinds=("audio",))
    assert base.media_encoder is None


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_preferences_and_ratings_about_sounds(kind: str, tmp_path: Path) -> None:
    """An adapter that has learned nothing, and log-probabilities of each document alone."""
    from lowrank.objectives.dpo import DPOConfig
    from lowrank.objectives.kto import KTOConfig
    from lowrank.records import Preference, Rated
    from lowrank.train.optimizers.adamw import AdamWConfig
    from lowrank.train.reference import References

    base, tokenizer = audio_base(tmp_path / "m", "qwen2_5_omni_thinker")
    write_sound_rows(tmp_path, RATE)
    question, answer = {"role": "user", "content": "<audio>Who?"}, {"role": "assistant", "content": "A man."}
    pair = {"prompt": "<audio>Who?", "chosen": "A man.", "rejected": "Nobody."}
    rated = {"messages": [question, answer], "label": True}
    path = tmp_path / "rows.jsonl"
    lines = [{**(pair if kind == "dpo" else rated), "audios": [f"sounds/{number}.wav"]} for number in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = DataConfig(train=(SourceConfig(path=str(path)),), shuffle=False, batch_size=2)
    record, objective = (Preference, DPOConfig()) if kind == "dpo" else (Rated, KTOConfig())
    step = prepare(config, tokenizer=tokenizer, record=record, seed=0, mismatched=kind == "kto").train.next_step()
    assert len(step) == 4
    assert all(each.media is not None for each in step)
    engine, _ = make_engine(base)
    slot = engine.bank.add(LoraConfig(rank=2), seed=0)
    engine.add(slot, objective.build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    references = References(engine, None)
    references.prepare(step)
    loss = engine.forward_backward({slot: references.attach(step)})[slot].loss
    assert loss == pytest.approx(np.log(2) if kind == "dpo" else 0.5, abs=1e-6)
    for one, other in zip(engine.logprobs(-1, step), [engine.logprobs(-1, [each])[0] for each in step]):
        assert np.abs(one - other).max() < 1e-5
