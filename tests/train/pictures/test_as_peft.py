"""Training with pictures, packed or padded, jobs together: as each document alone in transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.models.layers import is_outside, language_model
from lowrank.models.native_masks import FULL, SLIDING
from lowrank.segments import Segment
from tests.media_oracle import alone_loss
from tests.peft_oracle import peft_twin
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_vision_models import VISION_MODELS, VOCABULARY, make_model, make_vision_model, save_folder
from tests.vision_bases import FLOAT32_INSIDE, PADDED, base_of, families, segments_of, vision_base


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
