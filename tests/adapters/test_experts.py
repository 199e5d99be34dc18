"""Adapters on fused experts, against PEFT's `target_parameters`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lowrank.adapters.targets import find_targets, fused_parameters
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.rslora import RsLoraConfig
from lowrank.adapters.variants.vera import VeraConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.errors import ModelError
from tests.adapters.peft_twins import logits, moved, new_bank, on_disk
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_base, make_engine, make_model, random_step

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba"]
TOKEN = torch.tensor([[5, 9, 11, 3, 8], [7, 7, 4, 60, 90]])
BOTH = ("experts.gate_up_proj", "experts.down_proj")


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|pattern keys).*")
        yield


CONFIGS: dict[str, Any] = {
    "experts alone": LoraConfig(rank=2, alpha=6, target_modules=(), target_parameters=BOTH),
    "one of them": RsLoraConfig(rank=3, target_modules=("q_proj",), target_parameters=("experts.down_proj",)),
    "own ranks": LoraConfig(
        rank=2, target_modules=("o_proj",), target_parameters=BOTH, rank_pattern={"gate_up_proj": 4}
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_to_peft_and_back(family: str, case: str, tmp_path: Path) -> None:
    if family == "deepseek_v3" and "q_proj" in CONFIGS[case].target_modules:
        pytest.skip("this family has no q_proj")
    bank = new_bank(family)
    slot = bank.add(CONFIGS[case], seed=0)
    plain = make_model(family)(TOKEN).logits
    torch.testing.assert_close(logits(bank, slot), plain, rtol=1e-12, atol=1e-12)
    moved(bank, slot)
    ours = logits(bank, slot)
    assert (ours - plain).abs().max() > 1e-3
    save_adapter(tmp_path / "a", on_disk(bank, slot), describe_base(bank.base.model, family), dtype=None)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(make_model(family), str(tmp_path / "a"))(TOKEN).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)
    saved = load_adapter(tmp_path / "a")
    again = new_bank(family)
    other = again.add(saved.config, seed=5)
    again.load(other, saved.tensors)
    assert torch.equal(logits(again, other), ours)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_peft_to_ours(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    )
    twin = peft.get_peft_model(make_model(family), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for index, parameter in enumerate(twin.parameters()):
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(index)
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        theirs = twin(TOKEN).logits
    twin.save_pretrained(str(tmp_path / "a"))
    saved = load_adapter(tmp_path / "a")
    bank = new_bank(family)
    slot = bank.add(saved.config, seed=0)
    bank.load(slot, saved.tensors)
    torch.testing.assert_close(logits(bank, slot), theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_pefts_in_one_pass_with_other_slots(family: str, tmp_path: Path) -> None:
    """Slot 1 of 3, an adapter without experts beside it; losses and gradients in float64."""
    base = make_base(family)
    configs = [
        LoraConfig(rank=3, target_modules=("o_proj",)),
        LoraConfig(rank=2, target_modules=("o_proj",), target_parameters=BOTH),
        LoraConfig(rank=4, target_modules=(), target_parameters=(BOTH[1],)),
    ]
    engine, slots = make_engine(base, *configs)
    for slot in slots:
        moved(engine.bank, slot, 0.1)
    save_adapter(tmp_path / "a", on_disk(engine.bank, slots[1]), describe_base(base.model, family), dtype=None)
    twin = peft.PeftModel.from_pretrained(
        make_model(family), str(tmp_path / "a"), is_trainable=True, autocast_adapter_dtype=False
    ).eval()
    work = {slot: random_step(slot, [5 + slot, 9, 14]) for slot in slots}
    loss = plain_loss(twin, work[slots[1]])
    loss.backward()
    forwarded = engine.forward_backward(work)
    tolerance = 1e-10
    assert forwarded[slots[1]].loss == pytest.approx(loss.item(), abs=tolerance)
    theirs = sorted((tuple(p.shape), float(p.grad.norm())) for p in twin.parameters() if p.requires_grad)
    ours = sorted((tuple(p.shape), float(p.grad.norm())) for p in engine.bank.parameters(slots[1]).values())
    assert [shape for shape, _ in ours] == [shape for shape, _ in theirs]
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in theirs], rel=1e-8)
    alone = [parameter.grad.clone() for parameter in engine.bank.parameters(slots[1]).values()]
    for slot in slots:
        for parameter in engine.bank.parameters(slot).values():
            parameter.grad = None
    engine.forward_backward({slots[1]: work[slots[1]]})
    for one, other in zip(alone, engine.bank.parameters(slots[1]).values()):
        torch.testing.assert_close(one, other.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains(dtype: torch.dtype) -> None:
    engine, (slot,) = make_engine(
        make_base("mixtral", dtype), LoraConfig(rank=4, target_modules=(), target_parameters=BOTH)
    )
    work = {slot: random_step(0, [12, 20])}
    losses = []
    for _ in range(12):
        losses.append(engine.forward_backward(work)[slot].loss)
        assert not engine.optim_step(slot, 2e-2).skipped
    assert losses[-1] < losses[0] - 0.05
    engine.bank.remove(slot)
    assert not engine.bank.base.model.model.layers[0].mlp.experts.adapters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(target_parameters=("experts.gate_up_prj",)),
            r"'experts.gate_up_prj'; did you mean '.*gate_up_proj'",
        ),
        (LoraConfig(target_parameters=BOTH, dropout=0.1), "dropout does not reach fused experts"),
        (VeraConfig(target_parameters=BOTH), "adapter.type vera does not reach them"),
    ],
)
def test_what_cannot_be_done_is_said(config: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        new_bank("mixtral").add(config, seed=0)
    with pytest.raises(ModelError, match="no fused experts"):
        new_bank("llama").add(LoraConfig(target_parameters=BOTH), seed=0)


def test_all_linear_says_what_it_leaves_out_until_it_is_asked_for() -> None:
    model = make_model("qwen3_moe")
    missed = find_targets(model, LoraConfig()).unmatched_note
    assert missed is not None
    assert "target_parameters: [experts.down_proj, experts.gate_up_proj]" in missed
    assert find_targets(model, LoraConfig(target_parameters=BOTH)).unmatched_note is None
    assert len(fused_parameters(model)) == 4


class Listed(nn.Module):
    """A mixture as they were before transformers 5: a list of experts, each of which sees some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.lm_head = nn.Linear(8, 5)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_experts_in_a_list_are_found_before_the_first_step() -> None:
    found = find_targets(Listed(), LoraConfig())
    assert found.linears == ("gate",)
    assert "2 layers of single experts" in (found.unmatched_note or "")
    assert find_targets(Listed(), LoraConfig(target_modules=("experts.0",))).linears == ("experts.0",)
