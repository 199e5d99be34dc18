"""Heads, embeddings, norms and whole models per slot: PEFT and plain torch as oracles. Slots come and go."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import Trainer

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.errors import ModelError
from lowrank.models.checkpointing.memory_efficient_modules import use_memory_efficient_modules
from lowrank.objectives.sft import SFTConfig
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.adapters.variant_cases import GainConfig
from tests.peft_oracle import peft_twin, plain_loss
from tests.tiny_models import make_base, make_engine, make_model, random_step

CHOICES: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "only the head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "copy of the embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "copy of both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "copies of norms": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "copy of a linear": {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "all of it": {
        "target_modules": ["q_proj", "embed_tokens"],
        "modules_to_save": ["norm", "lm_head", "0.mlp.up_proj"],
    },
}
MODELS = {
    "untied": ("llama", False),
    "tied": ("llama", True),
    "scaled embedding": ("gemma3", True),
    "bias": ("phi", False),
}


def move(parameters: dict[str, torch.nn.Parameter], seed: int) -> None:
    """Away from the start, the same way for the same names."""
    with torch.no_grad():
        for index, name in enumerate(sorted(parameters)):
            generator = torch.Generator().manual_seed(1000 * seed + index)
            parameter = parameters[name]
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def loosely_scaled(family: str) -> float:
    """Gemma multiplies its embeddings by a number that transformers keeps in float32 or rounds otherwise than PEFT."""
    return 1e-6 if family == "gemma3" else 1e-11


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", CHOICES)
def test_heads_embeddings_and_copies_train_like_peft(choice: str, model: str) -> None:
    """Losses, every gradient and 3 AdamW steps; the slot shares the base with a slot of another kind."""
    family, tied = MODELS[model]
    settings = dict(CHOICES[choice])
    if family == "phi":
        renamed = {"norm": "layernorm", "0.mlp.up_proj": "0.mlp.fc1", "down_proj": "fc2"}
        settings = {key: [renamed.get(name, name) for name in names] for key, names in settings.items()}
    tolerance = loosely_scaled(family)
    base = make_base(family, tie_word_embeddings=tied)
    neighbor = {"target_modules": ("k_proj",), "modules_to_save": settings.get("modules_to_save", ())}
    engine, (other, slot) = make_engine(base, LoraConfig(rank=2, **neighbor), LoraConfig(rank=3, alpha=6, **settings))
    ours = engine.bank.parameters(slot)
    move(ours, 1)
    move(engine.bank.parameters(other), 2)
    twin, theirs = peft_twin(make_model(family, tie_word_embeddings=tied), ours, r=3, lora_alpha=6, **settings)
    optimizer = torch.optim.AdamW(theirs.values(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        work = {slot: random_step(step, [5, 9, 14]), other: random_step(50 + step, [4, 11])}
        loss = plain_loss(twin, work[slot])
        loss.backward()
        forwarded = engine.forward_backward(work)
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        for name, parameter in ours.items():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-6, atol=tolerance, msg=name)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for each in work:
            engine.optim_step(each, 1e-2)
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=0, atol=1e3 * tolerance, msg=name)


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_norms_of_heads_when_there_are_as_many_tokens_as_heads(family: str) -> None:
    """Gemma norms queries as (1, H, T, d), Qwen as (1, T, H, d): rows must go to their slot in both."""
    config = LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("q_norm", "k_norm"))
    engine, slots = make_engine(make_base(family), config, config)
    work = {slot: random_step(slot, [2]) for slot in slots}  # 4 tokens, 4 heads
    for slot in slots:
        move(engine.bank.parameters(slot), slot)
    together = engine.forward_backward(work)
    gradients = [{name: p.grad for name, p in engine.bank.parameters(slot).items()} for slot in slots]
    for slot in slots:
        engine.jobs[slot].optimizer.zero_grad()
        assert engine.forward_backward({slot: work[slot]})[slot].loss == pytest.approx(together[slot].loss, abs=1e-12)
        for name, parameter in engine.bank.parameters(slot).items():
            torch.testing.assert_close(parameter.grad, gradients[slot][name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2", "qwen3"])
def test_copies_of_lean_norms_train_like_peft(family: str) -> None:
    """In float32, where `float()` of what a norm has read is no copy of it; other slots read the same rows."""
    settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}
    base = make_base(family, torch.float32)
    assert use_memory_efficient_modules(base.model)
    engine, (other, slot) = make_engine(base, LoraConfig(rank=2), LoraConfig(rank=3, alpha=6, **settings))
    ours = engine.bank.parameters(slot)
    assert sum("norm" in name for name in ours) > 4
    move(ours, 1)
    engine.bank.refresh(slot)
    twin, theirs = peft_twin(make_model(family, torch.float32), ours, r=3, lora_alpha=6, **settings)
    work = {slot: random_step(0, [5, 9, 14]), other: random_step(50, [4, 11])}
    loss = plain_loss(twin, work[slot])
    loss.backward()
    assert engine.forward_backward(work)[slot].loss == pytest.approx(loss.item(), abs=1e-5)
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_copies_leave_the_base_and_each_other_alone() -> None:
    base = make_base("llama")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    copies = ("lm_head", "embed_tokens", "norm")
    engine, slots = make_engine(base, *[LoraConfig(rank=2, modules_to_save=copies)] * 2, learning_rate=1e-2)
    started = {name: value.detach().clone() for name, value in engine.bank.parameters(slots[1]).items()}
    engine.forward_backward({slots[0]: random_step(0, [12, 9])})
    engine.optim_step(slots[0], 1e-2)
    for name, value in base.model.state_dict().items():
        assert torch.equal(value, before[name.replace(".base", "")]), name
    for name, value in engine.bank.parameters(slots[1]).items():
        assert torch.equal(value, started[name]), name
    moved = engine.bank.parameters(slots[0])
    assert not torch.equal(moved["lm_head.weight"], started["lm_head.weight"])
    assert not torch.equal(moved["model.norm.weight"], started["model.norm.weight"])


def test_a_copy_is_kept_in_float32_under_a_bfloat16_base() -> None:
    engine, (slot,) = make_engine(
        make_base("llama", torch.bfloat16), LoraConfig(rank=2, modules_to_save=("lm_head", "norm"))
    )
    assert {value.dtype for value in engine.bank.parameters(slot).values()} == {torch.float32}
    losses = []
    for _ in range(5):
        losses.append(engine.forward_backward({slot: random_step(0, [12, 20])})[slot].loss)
        engine.optim_step(slot, 1e-2)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("first_noise", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_noise_adapters_and_copies_of_the_embedding_live_together(family: str, first_noise: bool) -> None:
    """Whichever job comes first: each job computes what it computes alone."""
    kinds = {
        "copy": LoraConfig(rank=2, target_modules=("q_proj",), modules_to_save=("embed_tokens",)),
        "adapter": LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens")),
        "plain": LoraConfig(rank=2, target_modules=("q_proj",)),
    }
    for order in (["copy", "adapter", "plain"], ["adapter", "plain", "copy"], ["plain", "copy", "adapter"]):
        bank = Bank(make_base(family))
        if first_noise:
            bank.enable_noise()
        engine = Engine(bank.base, bank, 4096)
        work = {}
        for kind in order:
            slot = bank.add(kinds[kind], seed=3)
            move(bank.parameters(slot), 7)
            engine.add(slot, SFTConfig().build(), AdamWConfig(), seed=5, neftune_alpha=5.0 if kind == "copy" else 0.0)
            work[slot] = random_step(len(kind), [6, 12])
        together = engine.forward_backward(work)
        for slot, kind in enumerate(order):
            alone, (own,) = make_engine(make_base(family), kinds[kind])
            alone.bank.remove(own)
            assert alone.bank.add(kinds[kind], seed=3) == own
            move(alone.bank.parameters(own), 7)
            alone.add(own, SFTConfig().build(), AdamWConfig(), seed=5, neftune_alpha=5.0 if kind == "copy" else 0.0)
            expected = alone.forward_backward({own: work[slot]})[own]
            assert together[slot].loss == pytest.approx(expected.loss, abs=1e-12), (order, kind)
            assert bank.parameters(slot).keys() == alone.bank.parameters(own).keys()
            for name, value in bank.parameters(slot).items():
                assert value.grad is not None
                torch.testing.assert_close(value.grad, alone.bank.parameters(own)[name].grad, rtol=0, atol=1e-11)


def test_a_freed_slot_is_used_again_and_its_memory_given_back() -> None:
    config = LoraConfig(rank=2, target_modules=("q_proj", "embed_tokens"), modules_to_save=("norm",))
    engine, slots = make_engine(make_base("llama"), config, config, config)
    assert slots == [0, 1, 2]
    kept = {name: value.detach().clone() for name, value in engine.bank.parameters(2).items()}
    engine.forward_backward({slot: random_step(slot, [8]) for slot in slots})
    watched = [weakref.ref(value) for value in engine.bank.parameters(1).values()]
    engine.remove(1)
    engine.bank.remove(1)
    gc.collect()
    assert not any(reference() is not None for reference in watched)
    with pytest.raises(KeyError):
        engine.bank.parameters(1)
    engine.jobs[2].optimizer.zero_grad()
    alone, _ = make_engine(make_base("llama"), config, config, config)
    work = {2: random_step(2, [8, 5])}
    assert engine.forward_backward(work)[2].loss == alone.forward_backward(work)[2].loss
    assert engine.bank.add(LoraConfig(rank=5), seed=9) == 1
    for name, value in engine.bank.parameters(2).items():
        assert torch.equal(value, kept[name])


def test_a_base_has_one_bank() -> None:
    """Layers route by the bank that wrapped them: another one's adapters would train, and change nothing."""
    base = make_base("llama")
    first, second = Bank(base), Bank(base)
    first.add(LoraConfig(rank=2), seed=0)
    with pytest.raises(ModelError, match="the adapters of another Bank are in its layers already"):
        second.add(LoraConfig(rank=2), seed=0)
    first.add(LoraConfig(rank=2), seed=1)


def test_the_start_depends_on_seed_and_name_alone() -> None:
    first, second = Bank(make_base("llama")), Bank(make_base("qwen2"))
    first.add(LoraConfig(rank=3), seed=8)
    one, other = (
        first.add(LoraConfig(rank=4, target_modules=("q_proj",)), seed=7),
        second.add(LoraConfig(rank=4), seed=7),
    )
    third = second.add(LoraConfig(rank=4), seed=8)
    name = "model.layers.1.self_attn.q_proj.lora_A.weight"
    torch.random.manual_seed(99)
    assert torch.equal(first.parameters(one)[name], second.parameters(other)[name])
    assert not torch.equal(second.parameters(third)[name], second.parameters(other)[name])
    assert not torch.equal(second.parameters(other)[name], second.parameters(other)[name.replace("q_proj", "o_proj")])


def test_load_lists_everything_that_does_not_fit_and_changes_nothing() -> None:
    bank = Bank(make_base("llama"))
    slot = bank.add(LoraConfig(rank=2, target_modules=("q_proj",)), seed=0)
    before = {name: value.detach().clone() for name, value in bank.parameters(slot).items()}
    tensors = {name: value + 1 for name, value in before.items()}
    missing, wrong, *_ = tensors
    del tensors[missing]
    tensors[wrong] = torch.zeros(3, 3)
    tensors["model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    with pytest.raises(ModelError) as caught:
        bank.load(slot, tensors)
    text = str(caught.value)
    assert f"{missing}: missing" in text
    assert f"{wrong}: shape (3, 3), expected" in text
    assert "model.layers.7.self_attn.q_proj.lora_A.weight: this adapter has no such tensor" in text
    for name, value in bank.parameters(slot).items():
        assert torch.equal(value, before[name])


def test_load_refreshes_the_working_copies() -> None:
    bank = Bank(make_base("llama", torch.bfloat16))
    slot = bank.add(LoraConfig(rank=2, target_modules=("q_proj",)), seed=0)
    bank.load(slot, {name: torch.full_like(value, 0.3) for name, value in bank.parameters(slot).items()})
    for layer in bank.slots[slot].layers.values():
        for copied in layer.compute_dtype_weights or ():
            assert copied.dtype == torch.bfloat16
            assert torch.equal(copied, torch.full_like(copied, 0.3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ("lm_head",), "dropout": 0.1}, "dropout does not reach lm_head"),
        ({"target_modules": ("q_proj",), "modules_to_save": ("q_proj",)}, "both in target_modules and modules_to_save"),
        ({"target_modules": ("embed_tokens",), "modules_to_save": ("embed_tokens",)}, "both in target_modules"),
        ({"modules_to_save": ("0.mlp",)}, r"modules_to_save: model.layers.0.mlp is a LlamaMLP; name linear layers"),
    ],
)
def test_what_cannot_be_attached(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Bank(make_base("llama")).add(LoraConfig(rank=2, **settings), seed=0)


def test_variants_that_are_no_low_rank_update_stay_off_heads_and_embeddings() -> None:
    config = GainConfig(target_modules=("q_proj", "lm_head", "embed_tokens"))
    with pytest.raises(ModelError, match=r"neither heads nor embeddings: leave lm_head, model\.embed_tokens out"):
        Bank(make_base("llama")).add(config, seed=0)


@pytest.mark.parametrize("layer", ["lm_head", "model.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("copy_first", [False, True])
def test_one_job_adapts_what_another_copies(layer: str, copy_first: bool) -> None:
    """Refused by name, in either order, and the bank is as before."""
    copies = LoraConfig(rank=2, target_modules=("k_proj",), modules_to_save=(layer,))
    adapts = LoraConfig(rank=2, target_modules=("k_proj", layer))
    bank = Bank(make_base("llama"))
    bank.add(copies if copy_first else adapts, seed=0)
    with pytest.raises(ModelError, match=f"{layer}: one job adapts it and another trains a copy"):
        bank.add(adapts if copy_first else copies, seed=0)
    assert list(bank.slots) == [0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("tied", [False, True])
def test_full_parameter_tuning_is_a_plain_torch_loop(tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    """The base's own parameters, 20 AdamW steps with weight decay where transformers' Trainer has it, and clipping;
    tied embeddings get both gradients."""
    base = make_base("llama", dtype, tie_word_embeddings=tied)
    base.model.requires_grad_(True)
    engine = Engine(base, Bank(base), micro_batch_tokens=30)
    settings = AdamWConfig(weight_decay=0.1, max_grad_norm=0.5)
    engine.add(BASE_SLOT, SFTConfig().build(), settings, seed=0, neftune_alpha=0.0)
    twin = make_model("llama", dtype, tie_word_embeddings=tied).requires_grad_(True)
    assert ("lm_head.weight" in engine.jobs[BASE_SLOT].parameters) is not tied
    decayed = Trainer.get_decay_parameter_names(None, twin)  # type: ignore[arg-type]  # asks nothing of the trainer
    groups = [
        {
            "params": [value for name, value in twin.named_parameters() if (name in decayed) is wanted],
            "weight_decay": decay,
        }
        for wanted, decay in ((True, 0.1), (False, 0.0))
    ]
    assert all(group["params"] for group in groups)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for step in range(20):
        segments = random_step(step, [5, 17, 9, 14])
        loss = plain_loss(twin, segments)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        assert norm > 0.5, "clipping is part of the test"
        optimizer.step()
        optimizer.zero_grad()
        forwarded = engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT]
        updated = engine.optim_step(BASE_SLOT, 1e-3)
        assert forwarded.loss == pytest.approx(loss.item(), abs=tolerance)
        assert updated.grad_norm == pytest.approx(norm.item(), rel=1e-4 if dtype == torch.float32 else 1e-9)
    for name, parameter in twin.named_parameters():
        # Adam divides by the root of the squared gradient: float32 rounding of tiny gradients is blown up
        torch.testing.assert_close(base.model.get_parameter(name), parameter, rtol=0, atol=10 * tolerance, msg=name)


def test_full_parameter_tuning_hears_neftune() -> None:
    losses = []
    for alpha in (0.0, 5.0):
        base = make_base("llama")
        base.model.requires_grad_(True)
        engine = Engine(base, Bank(base), 4096)
        engine.add(BASE_SLOT, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=alpha)
        work = {BASE_SLOT: random_step(0, [9, 20])}
        losses.append((engine.forward_backward(work)[BASE_SLOT].loss, engine.evaluate(work)[BASE_SLOT].loss))
        table = engine.jobs[BASE_SLOT].parameters["model.embed_tokens.weight"]
        assert table.grad is not None
        assert table.grad.norm() > 0
    (plain, evaluated), (noisy, evaluated_noisy) = losses
    assert abs(noisy - plain) > 1e-4
    assert plain == evaluated == evaluated_noisy
