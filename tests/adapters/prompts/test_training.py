"""The contract of virtual tokens in training, PEFT as oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.errors import ModelError
from lowrank.planning.memory import StepMemory
from lowrank.segments import Segment, number_the_step
from tests.adapters.isolation import assert_isolated
from tests.adapters.prompts.cases import (
    CASES,
    PEERS,
    PROMPTS,
    Peer,
    every_case,
    every_prompt,
    families,
    peer_of,
    slow,
)
from tests.peft_oracle import plain_loss
from tests.planning.test_memory import folder_of, measured, planned
from tests.tiny_models import make_base, make_engine, random_step

PLANNED_TOO = ("prompt_tuning", "p_tuning", "prefix_tuning projection")


def test_every_file_has_a_peer() -> None:
    assert PEERS.keys() == CASES.keys()
    assert PROMPTS.keys() >= {"prompt_tuning", "p_tuning", "prefix_tuning"}


@families("llama", "qwen3", "gpt2", "gemma2")
@every_case
def test_losses_and_gradients_equal_pefts_beside_lora_jobs(case: str, family: str) -> None:
    """Slot 1 of 3 in float64; three AdamW steps; grouped-query attention, wide heads, learned positions, windows."""
    engine, (before, slot, behind) = make_engine(
        make_base(family), LoraConfig(rank=4), CASES[case], LoraConfig(rank=2), learning_rate=1e-2
    )
    ours = engine.bank.parameters(slot)
    twin, theirs = peer_of(case, family, ours)
    tolerance = 1e-6 if family == "gemma2" else 1e-11  # transformers takes its softmax in float32
    optimizer = torch.optim.AdamW([theirs[key] for key in ours], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        work = {each: random_step(10 * step + each, [5 + each, 9, 14]) for each in (before, slot, behind)}
        loss = plain_loss(Peer(twin), work[slot])
        loss.backward()
        forwarded = engine.forward_backward(work)
        assert forwarded[slot].loss == pytest.approx(loss.item(), abs=tolerance)
        assert forwarded[slot].tokens == 6 + 9 + 14  # virtual tokens are in no number
        for key, value in ours.items():
            assert value.grad is not None
            torch.testing.assert_close(value.grad, theirs[key].grad, rtol=1e3 * tolerance, atol=tolerance, msg=key)
        if family == "gemma2":
            return
        torch.nn.utils.clip_grad_norm_([theirs[key] for key in ours], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for each in work:
            engine.optim_step(each, 1e-2)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-7, msg=key)


@every_case
def test_neighbors_do_not_see_it(case: str) -> None:
    """Losses and gradients of all jobs, together in small pieces and alone; a prompt that is NaN is its own affair."""
    configs = (LoraConfig(rank=4), CASES[case], LoraConfig(rank=2), CASES[case])
    engine, slots = make_engine(make_base("llama"), *configs)
    work = {slot: random_step(slot, [5 + slot, 9, 14, 3]) for slot in slots}
    grads = assert_isolated(engine, slots, work)
    assert all(grads[slot].keys() == engine.bank.parameters(slot).keys() for slot in slots)


@every_prompt
def test_answers_to_one_prompt_share_it_and_its_virtual_tokens(name: str) -> None:
    """The pairs of preference jobs, with and without sharing: losses, gradients, log-probabilities."""
    engine, (lora, slot) = make_engine(make_base("llama"), LoraConfig(rank=2), PROMPTS[name])
    prompt_L, answers = np.arange(10, 24), [np.arange(30, 35), np.arange(40, 48)]
    pairs = [
        Segment(np.r_[prompt_L + pair, each], np.r_[np.zeros(14), np.ones(len(each))].astype(np.float32), pair=pair)
        for pair in (0, 1)
        for each in answers
    ]
    work = {lora: number_the_step(pairs), slot: number_the_step(pairs)}
    found = []
    for shares in (False, True):
        engine.shares_prompts = shares
        assert any(any(batch.prefixes) for batch in engine.micro_batches(work)) == shares
        losses = {each: forwarded.loss for each, forwarded in engine.forward_backward(work).items()}
        grads = [p.grad.clone() for p in engine.bank.parameters(slot).values() if p.grad is not None]
        found.append((losses, grads, engine.logprobs(slot, pairs)))
        engine.jobs[slot].optimizer.zero_grad()
    (losses, grads, described), (shared_losses, shared_grads, shared_described) = found
    assert shared_losses == pytest.approx(losses, abs=1e-11)
    for one, other in zip(grads, shared_grads):  # Llama's norms round to float32 on the way
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-8)
    for one_L, other_L in zip(described, shared_described):
        np.testing.assert_allclose(one_L, other_L, atol=1e-6)


@pytest.mark.parametrize(
    "activation_checkpointing", ["full", pytest.param("sqrt", marks=slow), pytest.param("selective", marks=slow)]
)
@every_prompt
def test_recomputed_layers_give_the_same_gradients(name: str, activation_checkpointing: str) -> None:
    from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing

    engine, (slot,) = make_engine(make_base("llama"), PROMPTS[name])
    work = {slot: random_step(0, [5, 9, 14])}
    kept = []
    for how in ("none", activation_checkpointing):
        set_activation_checkpointing(engine.base.model, how)
        engine.forward_backward(work)
        kept.append([p.grad.clone() for p in engine.bank.parameters(slot).values() if p.grad is not None])
        engine.jobs[slot].optimizer.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*kept))


@every_case
def test_resumes_to_the_same_bits(case: str) -> None:
    engine, (slot,) = make_engine(make_base("llama"), CASES[case])
    engine.forward_backward({slot: random_step(0, [9, 14])})
    engine.optim_step(slot, 1e-2)
    state, saved = engine.bank.state(slot), engine.bank.saved(slot)
    again, (other,) = make_engine(make_base("llama"), CASES[case])
    if state:
        again.bank.load_state(other, state)
    else:
        again.bank.load(other, saved.tensors)
    for key, value in engine.bank.parameters(slot).items():
        assert torch.equal(value, again.bank.parameters(other)[key]), key
    assert (case in ("prompt_tuning", "prefix_tuning")) == (not state)
    if state:
        with pytest.raises(ModelError, match="do not hold the encoder"):
            again.bank.load(other, saved.tensors)


@pytest.mark.parametrize("case", ["prefix_tuning", *(pytest.param(case, marks=slow) for case in PLANNED_TOO)])
def test_a_planned_step_is_a_real_step(case: str, tmp_path: Path) -> None:
    """Virtual tokens and the copies of keys and values are in the plan. Not what torch's fused LSTM keeps beside its
    outputs, which a plan does not see: a few times K x hidden numbers."""
    settings = folder_of("llama", tmp_path)
    jobs = planned(LoraConfig(rank=4), CASES[case].model_copy(update={"num_virtual_tokens": 40}), lengths=[16, 20, 9])
    static, peak = measured(settings, jobs, 4096, "none")
    step = StepMemory(settings, jobs).step(4096, "none")
    assert step.base + step.adapters == pytest.approx(static, rel=0.03)
    assert step.total - step.static == pytest.approx(peak, rel=0.1)
