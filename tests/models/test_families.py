"""Every family the field trains: same losses, gradients and updates as PEFT, packed or padded, and no leak."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import pack
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.isolation import check_head
from tests.peft_oracle import peft_twin, plain_loss
from tests.tiny_models import FAMILIES, make_base, make_engine, make_model, random_step

PADDED = {"bloom", "mpt", "stablelm", "jamba"}
"""Families whose attention cannot be told about documents; the leak test must find that out."""
if Version(transformers.__version__) < Version("5.24"):
    PADDED.add("falcon")  # its attention was its own until then
if Version(transformers.__version__) < Version("5.21"):
    PADDED.add("gemma2")  # in float64, the dtype here: its softmax in float32 made a document's result depend on others
FLOAT32_INSIDE = {"gemma2", "mpt"}
"""transformers computes their softmax in float32 whatever the model's dtype, we do not."""
ROUTED_IN_FLOAT32 = {"deepseek_v3"}
"""The scores of experts, which weigh their outputs."""

RENAMED_BY_PEFT = {"deepseek_v3"}
"""PEFT 0.21 takes these families' `gate_proj` ... for the experts' old names, also where it means a dense layer."""


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_like_peft(family: str) -> None:
    base = make_base(family)
    twin_model = make_model(family)
    assert base.layout == ("padded" if family in PADDED else "packed")
    check_head(base)
    excluded = ("gate_proj", "up_proj", "down_proj") if family in RENAMED_BY_PEFT else ()
    configs = [LoraConfig(rank=rank, alpha=8, exclude_modules=excluded) for rank in (4, 2, 8)]
    engine, slots = make_engine(base, *configs, learning_rate=1e-2)
    parameters = engine.bank.parameters(slots[1])
    modules = sorted({name.partition(".lora_")[0].replace(".", r"\.") for name in parameters})
    twin, own = peft_twin(twin_model, parameters, r=2, lora_alpha=8, target_modules="|".join(modules))
    optimizer = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.0)
    tolerance = 1e-5 if family in FLOAT32_INSIDE else 1e-7 if family in ROUTED_IN_FLOAT32 else 1e-10
    for step in range(3):
        work = {slot: random_step(10 * step + slot, [5 + slot, 9, 14, 7 + step]) for slot in slots}
        loss = plain_loss(twin, work[slots[1]])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        forwarded = engine.forward_backward(work)
        updated = {slot: engine.optim_step(slot, 1e-2) for slot in slots}
        assert forwarded[slots[1]].loss == pytest.approx(loss.item(), abs=tolerance)
        assert updated[slots[1]].grad_norm == pytest.approx(norm.item(), abs=tolerance)
        assert norm > 0
    for name, parameter in parameters.items():
        # AdamW divides a gradient as small as its eps by that eps: what is rounding there is a hundred times as much
        torch.testing.assert_close(parameter, own[name], rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_changes_nothing(family: str, dtype: torch.dtype) -> None:
    base = make_base(family, dtype)
    batch = pack([(-1, segment) for segment in random_step(0, [6, 11, 4])])
    with torch.no_grad():
        before = base.hidden(batch)
        engine, (slot,) = make_engine(base, LoraConfig(rank=4))
        routed = pack([(slot, segment) for segment in random_step(0, [6, 11, 4])])
        after = engine.bank.hidden(routed)
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("activation_checkpointing", ["full", 1])
def test_recompute_changes_nothing(family: str, activation_checkpointing: str | int) -> None:
    work = random_step(3, [9, 20, 6])
    results = []
    for policy in ("none", activation_checkpointing):
        base = make_base(family)
        engine, (slot,) = make_engine(base, LoraConfig(rank=4, dropout=0.2))
        set_activation_checkpointing(base.model, policy)
        with torch.no_grad():
            for parameter in engine.bank.parameters(slot).values():
                parameter.add_(0.01)
        loss = engine.forward_backward({slot: work})[slot].loss
        results.append((loss, [p.grad.clone() for p in engine.bank.parameters(slot).values()]))
    (loss, gradients), (again, recomputed) = results
    assert loss == again
    for one, other in zip(gradients, recomputed):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_masked_attention_is_not_confused_by_a_padded_bucket() -> None:
    """Documents of one length, of many lengths, and of one token give what each gives alone."""
    base = make_base("llama")
    documents = random_step(1, [33, 1, 32, 64, 2, 31, 33])
    with torch.no_grad():
        together = base.hidden(pack([(-1, document) for document in documents]))
        alone = torch.cat([base.hidden(pack([(-1, document)])) for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_experts_are_announced() -> None:
    engine, (slot,) = make_engine(make_base("mixtral"), LoraConfig())
    missed = engine.bank.slots[slot].unmatched_note
    assert missed is not None
    assert "gate_up_proj" in missed
