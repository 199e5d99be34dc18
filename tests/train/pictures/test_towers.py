"""Adapters on towers: each job its own, computed again, with dropout; beside PEFT on each document alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.layers import Parts
from tests.media_oracle import alone_loss
from tests.peft_oracle import peft_twin
from tests.tiny_models import make_engine, pretend_learned
from tests.tiny_vision_models import make_vision_model
from tests.vision_bases import FLOAT32_INSIDE, families, segments_of, vision_base


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
