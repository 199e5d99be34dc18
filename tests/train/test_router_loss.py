"""The load-balancing loss of routers is transformers', with its gradient, of each job by itself."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.checkpointing.activation_checkpointing import set_activation_checkpointing
from lowrank.models.checks.isolation import choose_layout
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.router_loss import expert_numbers
from tests.tiny_models import VOCABULARY, make_base, make_model

COEFFICIENT = 0.7


def segment(length: int = 20, seed: int = 0) -> Segment:
    token_L = np.random.default_rng(seed).integers(3, VOCABULARY, length)
    return Segment(token_L, np.concatenate([[0.0], np.ones(length - 1)]).astype(np.float32))


def of_transformers(model: Any, of: Segment) -> torch.Tensor:
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = COEFFICIENT
    token = torch.from_numpy(of.token_L)[None]
    return model(input_ids=token, labels=token, output_router_logits=True).loss


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_full_tuning_equals_transformers(family: str, recompute: Any) -> None:
    theirs = make_model(family, torch.float32, initializer_range=0.3).requires_grad_(True)
    base = Base(copy.deepcopy(theirs), None, family)
    choose_layout(base, "auto")
    set_activation_checkpointing(base.model, recompute)
    base.router_aux_loss_coef = COEFFICIENT
    engine = Engine(base, Bank(base), 64)
    engine.add(BASE_SLOT, SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    loss = of_transformers(theirs, segment())
    loss.backward()
    forwarded = engine.forward_backward({BASE_SLOT: [segment()]})[BASE_SLOT]
    assert forwarded.loss == pytest.approx(loss.item(), rel=1e-5)
    assert forwarded.metrics["router_loss"] > 0.1
    for name, value in theirs.named_parameters():
        if value.grad is not None:
            own = engine.jobs[BASE_SLOT].parameters[name].grad
            torch.testing.assert_close(own, value.grad, rtol=1e-4, atol=1e-5)


def test_of_each_job_by_itself() -> None:
    """Beside another job, what it is alone; held-out losses are without it."""
    found: dict[int, list[float]] = {}
    for number in (1, 2):
        base = make_base("qwen3_moe", torch.float32, initializer_range=0.3)
        base.router_aux_loss_coef = COEFFICIENT
        engine = Engine(base, Bank(base), 64)
        for seed in range(number):
            slot = engine.bank.add(LoraConfig(rank=4, target_modules=["q_proj"]), seed=seed)
            engine.add(slot, SFTConfig().build(), AdamWConfig(), seed=seed, neftune_alpha=0.0)
        work = {slot: number_the_step([segment(seed=slot), segment(9, slot)]) for slot in range(number)}
        forwarded = engine.forward_backward(work)[0]
        found[number] = [forwarded.loss, forwarded.metrics["router_loss"]]
        assert engine.evaluate(work)[0].loss == pytest.approx(found[number][0] - found[number][1], rel=1e-5)
    assert found[1] == pytest.approx(found[2], rel=1e-5)


def test_a_dense_model_has_no_routers() -> None:
    with pytest.raises(ModelError, match="has no routers that transformers records"):
        expert_numbers(make_base("llama"))
