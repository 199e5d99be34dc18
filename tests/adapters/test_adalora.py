"""AdaLoRA against PEFT's: fifty steps with the rank allocator, files both ways, resume in the middle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.adalora import AdaLoraConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.optimizer_state import flatten_optimizer, restore_optimizer
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import load_adapter, save_adapter
from lowrank.objectives.sft import SFTConfig
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.adapters.peft_twins import TOKEN, logits, on_disk
from tests.peft_oracle import plain_loss
from tests.tiny_models import make_base, make_model, random_step

STEPS = 50
OURS = AdaLoraConfig(rank=6, target_r=3, alpha=9, tinit=5, tfinal=0.3, deltaT=4, target_modules=("q_proj", "up_proj"))
RATE = 3e-2


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(`r` is not used|num_steps|fan_in_fan_out).*")
        yield


def peers_config(**others: Any) -> Any:
    settings = {"init_r": 6, "target_r": 3, "lora_alpha": 9, "tinit": 5, "tfinal": 15, "deltaT": 4, "total_step": STEPS}
    return peft.AdaLoraConfig(**{**settings, "target_modules": ["q_proj", "up_proj"], **others})


def output_of(bank: Bank, slot: int) -> torch.Tensor:
    """Logits, by the model's own attention."""
    with bank.base.using_attention(bank.base.own_attention):
        return logits(bank, slot)


def engine_with(*configs: Any) -> tuple[Engine, list[int]]:
    base = make_base("llama")
    engine = Engine(base, Bank(base), 4096)
    slots = [engine.bank.add(config, seed=seed) for seed, config in enumerate(configs)]
    for slot in slots:
        engine.add(slot, SFTConfig().build(), AdamWConfig(learning_rate=RATE), 0, 0.0, STEPS)
    return engine, slots


def trained(engine: Engine, slots: list[int], first: int, last: int) -> None:
    for step in range(first, last):
        engine.forward_backward({slot: random_step(step % 5, [9, 14]) for slot in slots})
        for slot in slots:
            engine.optim_step(slot, RATE)


def peer(ours: dict[str, torch.nn.Parameter]) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    twin = peft.get_peft_model(make_model("llama"), peers_config(), autocast_adapter_dtype=False).eval()
    theirs = {
        key.removeprefix("base_model.model.").replace(".default", ""): value
        for key, value in twin.named_parameters()
        if value.requires_grad and "ranknum" not in key  # PEFT would train the number it divides by
    }
    names = {key: key.removesuffix(".weight") for key in ours}
    assert set(names.values()) == theirs.keys()
    with torch.no_grad():
        for key, name in names.items():
            theirs[name].copy_(ours[key])
    return twin, {key: theirs[name] for key, name in names.items()}


def test_fifty_steps_with_the_allocator_equal_pefts(tmp_path: Path) -> None:
    """Weights, which ranks are left, and the files both write in the end; a LoRA job beside it."""
    engine, slots = engine_with(LoraConfig(rank=4), OURS)
    ours = engine.bank.parameters(slots[1])
    twin, theirs = peer(ours)
    optimizer = torch.optim.AdamW([theirs[key] for key in ours], lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        loss = plain_loss(twin, random_step(step % 5, [9, 14]))
        penalties = [
            torch.linalg.norm(rows @ rows.T - torch.eye(len(rows)))
            for key, value in theirs.items()
            if "lora_E" not in key
            for rows in [value if "lora_A" in key else value.T]
        ]
        (loss + 0.5 * torch.stack(penalties).mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_([theirs[key] for key in ours], 1.0)
        forwarded = engine.forward_backward({slot: random_step(step % 5, [9, 14]) for slot in slots})[slots[1]]
        assert forwarded.loss == pytest.approx(loss.item(), abs=1e-7)
        assert forwarded.metrics["penalty"] == pytest.approx(0.5 * torch.stack(penalties).mean().item(), abs=1e-8)
        for slot in slots:
            updated = engine.optim_step(slot, RATE)
        assert updated.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        optimizer.step()
        twin.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6, msg=f"{key} after step {step + 1}")
        zeros = {key: (value == 0).flatten().tolist() for key, value in ours.items() if "lora_E" in key}
        assert zeros == {key: (theirs[key] == 0).flatten().tolist() for key in zeros}
    pattern = {key.replace(".default", ""): kept for key, kept in twin.peft_config["default"].rank_pattern.items()}
    assert sum(map(sum, pattern.values())) == 3 * len(pattern)
    assert len({sum(kept) for kept in pattern.values()}) > 1  # layers differ
    assert {key.removesuffix(".weight"): [not each for each in own] for key, own in zeros.items()} == {
        key.removeprefix("base_model.").removeprefix(
            "model.",
        )
        if key.startswith("base_model.model.model")
        else key: own
        for key, own in ((key.removeprefix("base_model.model."), own) for key, own in pattern.items())
    }
    with torch.no_grad():
        expected = twin(TOKEN).logits
    torch.testing.assert_close(output_of(engine.bank, slots[1]), expected, rtol=1e-6, atol=1e-6)

    save_adapter(
        tmp_path / "ours", on_disk(engine.bank, slots[1]), describe_base(engine.base.model, "llama"), dtype=None
    )
    loaded = peft.PeftModel.from_pretrained(make_model("llama"), str(tmp_path / "ours"), autocast_adapter_dtype=False)
    assert loaded.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKEN).logits, expected, rtol=1e-6, atol=1e-6)
    twin.save_pretrained(str(tmp_path / "theirs"))
    for name in ("ours", "theirs"):
        saved = load_adapter(tmp_path / name)
        assert saved.config.type == "lora"
        assert sum(rank for rank, _ in saved.targets.values()) <= 3 * len(pattern) + sum(
            not any(own) for own in pattern.values()
        )
        bank = Bank(make_base("llama"))
        slot = bank.add(saved.config, seed=0)
        bank.load(slot, saved.tensors)
        torch.testing.assert_close(output_of(bank, slot), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", [pytest.param(3, marks=pytest.mark.slow), 22, pytest.param(40, marks=pytest.mark.slow)])
def test_resumes_to_the_same_bits(cut: int) -> None:
    """Before ranks fall, while they fall, and when they stay."""
    whole, (slot,) = engine_with(OURS)
    trained(whole, [slot], 0, cut)
    state = {key: value.clone() for key, value in whole.bank.state(slot).items()}
    job = whole.jobs[slot]
    moments = {key: value.clone() for key, value in flatten_optimizer(job.optimizer, job.parameters).items()}
    trained(whole, [slot], cut, STEPS)
    again, (other,) = engine_with(OURS)
    again.bank.load_state(other, state)
    restore_optimizer(again.jobs[other].optimizer, again.jobs[other].parameters, moments)
    again.jobs[other].step = cut
    trained(again, [other], cut, STEPS)
    for key, value in whole.bank.parameters(slot).items():
        assert torch.equal(value, again.bank.parameters(other)[key]), key


def test_files_hold_what_was_evaluated_at_any_step(tmp_path: Path) -> None:
    """Between two allocations numbers that were set to 0 have moved again: they are saved too."""
    engine, (slot,) = engine_with(OURS)
    for step in range(STEPS):
        trained(engine, [slot], step, step + 1)
        if step in (0, 9, 11, 13, 36, 49):
            saved = engine.bank.saved(slot)
            bank = Bank(make_base("llama"))
            save_adapter(
                tmp_path / "a", on_disk(engine.bank, slot), describe_base(bank.base.model, "llama"), dtype=None
            )
            read = load_adapter(tmp_path / "a")
            bank.load(bank.add(read.config, seed=0), read.tensors)
            torch.testing.assert_close(output_of(bank, 0), output_of(engine.bank, slot), rtol=1e-9, atol=1e-9)
            assert saved.ranks == read.targets


def test_a_job_too_short_for_its_schedule_is_refused() -> None:
    assert OURS.schedule_problem(50) is None
    assert "none in which ranks fall" in (OURS.schedule_problem(7) or "")
    assert AdaLoraConfig().schedule_problem(10) is None
    with pytest.raises(ValueError, match="target_r: 9 is more than the rank of 8"):
        AdaLoraConfig(rank=8, target_r=9)
    with pytest.raises(ValueError, match="rank_pattern: AdaLoRA finds the ranks itself"):
        AdaLoraConfig(rank_pattern={"q_proj": 2})


def test_adapters_that_are_broken_are_refused(tmp_path: Path) -> None:
    twin = peft.get_peft_model(make_model("llama"), peers_config())
    twin.save_pretrained(str(tmp_path / "a"))
    saved = load_adapter(tmp_path / "a")
    assert saved.config.rank == 6
    assert copy.deepcopy(saved.targets)
