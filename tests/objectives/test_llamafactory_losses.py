"""Losses that LLaMA-Factory has: loss and gradient of every parameter equal the published formula on the same rows.

The peers compute on whole logits, one row after another; the engine cuts the step into several batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from lowrank.adapters.bank import Bank
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.objectives import Objective
from lowrank.objectives.dpo import DPOConfig
from lowrank.objectives.pretrain import PretrainConfig
from lowrank.objectives.sft import SFTConfig
from lowrank.segments import Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.objectives.test_trl import compare_gradients, engine_for
from tests.objectives.test_trl import rows as pairs
from tests.tiny_models import VOCABULARY, make_base, make_model

Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(logits_TV, target_T, logits of the reference_TV) -> loss` over the learned tokens of the step."""


def rows(seed: int = 0) -> list[Segment]:
    generator = np.random.default_rng(seed)
    found = []
    for length in (9, 4, 13, 7):
        weight_L = np.concatenate([[0.0, 0.0], np.ones(length - 2)]).astype(np.float32)
        found.append(Segment(generator.integers(3, VOCABULARY, length), weight_L))
    return number_the_step(found)


def learned(model: Any, segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of the tokens that carry weight."""
    logits, targets = [], []
    for segment in segments:
        token_L = torch.from_numpy(segment.token_L)
        all_LV = model(input_ids=token_L[None]).logits[0].float()
        index_K = torch.from_numpy(segment.weight_L).nonzero()[:, 0]
        logits.append(all_LV[index_K - 1])
        targets.append(token_L[index_K])
    return torch.cat(logits), torch.cat(targets)


def dft(logits_TV: torch.Tensor, target_T: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """arXiv:2508.05629, equation 9."""
    probability_T = logits_TV.softmax(-1)[torch.arange(len(target_T)), target_T]
    return -(probability_T.detach() * probability_T.log()).mean()


def asft(logits_TV: torch.Tensor, target_T: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """DFT, and 0.3 KL(reference || model)."""
    divergence = F.kl_div(logits_TV.log_softmax(-1), reference_TV.softmax(-1), reduction="batchmean")
    return dft(logits_TV, target_T, reference_TV) + 0.3 * divergence


def eaft(logits_TV: torch.Tensor, target_T: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """Cross-entropy weighed by (entropy of the 20 likeliest, renormalized, / 3)^2."""
    p_TN = logits_TV.detach().topk(20).values.softmax(-1)
    weight_T = (-(p_TN * p_TN.log()).sum(-1) / 3.0) ** 2
    return (weight_T * F.cross_entropy(logits_TV, target_T, reduction="none")).mean()


def smoothed(logits_TV: torch.Tensor, target_T: torch.Tensor, reference_TV: torch.Tensor) -> torch.Tensor:
    """transformers', which LLaMA-Factory uses."""
    return LabelSmoother(epsilon=0.2)({"logits": logits_TV[None]}, target_T[None])


CASES: dict[str, tuple[Objective, Peer]] = {
    "dft": (SFTConfig(loss_type="dft").build(), dft),
    "asft": (SFTConfig(loss_type="asft", asft_alpha=0.3).build(), asft),
    "eaft": (SFTConfig(loss_type="eaft", eaft_alpha=2.0).build(), eaft),
    "smoothed": (SFTConfig(label_smoothing=0.2).build(), smoothed),
    "smoothed-text": (PretrainConfig(label_smoothing=0.2).build(), smoothed),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", torch.float32, initializer_range=0.2, tie_word_embeddings=False)


@pytest.mark.parametrize("name", CASES)
def test_full_tuning(model: Any, name: str) -> None:
    objective, peer = CASES[name]
    theirs = copy.deepcopy(model).requires_grad_(True)
    other = make_model("llama", torch.float32, initializer_range=0.3, tie_word_embeddings=False)
    loss = peer(*learned(theirs, rows()), learned(other, rows())[0].detach())
    loss.backward()
    engine = engine_for(model, objective, 16)
    engine.reference_base = Base(other.requires_grad_(False), None, "other")
    choose_layout(engine.reference_base, "auto")
    assert len(engine.micro_batches({BASE_SLOT: rows()})) > 1
    forwarded = engine.forward_backward({BASE_SLOT: rows()})[BASE_SLOT]
    assert forwarded.loss == pytest.approx(loss.item(), rel=1e-5)
    assert engine.evaluate({BASE_SLOT: rows()})[BASE_SLOT].loss == pytest.approx(loss.item(), rel=1e-5)
    compare_gradients(engine, theirs, 1e-5)


def test_asft_of_an_adapter_compares_with_the_bare_base() -> None:
    """Beside another job, in the same passes."""
    base = make_base("llama")
    engine = Engine(base, Bank(base), 24)
    slots = [engine.bank.add(LoraConfig(rank=4, target_modules=["q_proj", "down_proj"]), seed=seed) for seed in (0, 1)]
    for slot, loss_type in zip(slots, ("asft", "nll")):
        engine.add(slot, SFTConfig(loss_type=loss_type).build(), AdamWConfig(learning_rate=0.05), 0, 0.0)
    with torch.no_grad():
        for slot in slots:
            for value in engine.jobs[slot].parameters.values():
                value.normal_(generator=torch.Generator().manual_seed(slot))
            engine.bank.refresh(slot)
    loss = engine.forward_backward(dict.fromkeys(slots, rows()))[slots[0]].loss
    bare, target_T = learned(make_model("llama", torch.float64), rows())
    hidden = []
    for segment in rows():
        logits_LV = engine.base.head().logits(engine.bank.hidden(engine.micro_batches({slots[0]: [segment]})[0]))
        hidden.append(logits_LV[torch.from_numpy(segment.weight_L).nonzero()[:, 0] - 1])
    expected = dft(torch.cat(hidden), target_T, bare) + 0.1 * F.kl_div(
        torch.cat(hidden).log_softmax(-1), bare.softmax(-1), reduction="batchmean"
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert expected > 1.01 * dft(torch.cat(hidden), target_T, bare), "or the adapter did nothing"


def bco(model: Any, segments: Sequence[Segment], weight: float, earlier: Sequence[float]) -> tuple[torch.Tensor, float]:
    """(DPO + weight BCO) / (1 + weight); BCO: -log s(r+ - d) - log s(-(r- - d)), d the mean of the steps' rewards."""
    rewards = []
    for segment in segments:
        logits, target = learned(model, [segment])
        logp = logits.log_softmax(-1).gather(1, target[:, None]).sum()
        assert segment.reference_L is not None
        rewards.append(0.1 * (logp - float(segment.reference_L.sum())))
    chosen_P, rejected_P = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
    here = float(torch.cat([chosen_P, rejected_P]).detach().mean())
    mean = float(np.mean([*earlier, here]))
    bco_P = -F.logsigmoid(chosen_P - mean) - F.logsigmoid(-(rejected_P - mean))
    return ((-F.logsigmoid(chosen_P - rejected_P) + weight * bco_P) / (1 + weight)).mean(), here


def test_bco_beside_dpo(model: Any) -> None:
    objective = DPOConfig(bco_weight=0.6).build()
    engine = engine_for(model, objective, 40)
    earlier: list[float] = []
    for seed in (0, 1):
        segments = pairs(objective, seed)
        engine.jobs[BASE_SLOT].optimizer.zero_grad()
        theirs = copy.deepcopy(model).requires_grad_(True)
        loss, here = bco(theirs, segments, 0.6, earlier)
        loss.backward()
        held_out = engine.evaluate({BASE_SLOT: segments})[BASE_SLOT].loss
        assert engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT].loss == pytest.approx(loss.item(), rel=1e-5)
        assert held_out == pytest.approx(loss.item(), rel=1e-5), "looking changes nothing"
        compare_gradients(engine, theirs, 1e-5)
        earlier.append(here)
