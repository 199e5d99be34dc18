"""Each objective's loss, gradient and metrics are TRL's, on the same weights and the same rows.

The rows are random, in float32. With --shared-data they are those of LLaMA-Factory's demo files, in float64, since sums
of log-probabilities over long answers are only good to some 1e-4 in float32, on either side.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.models.base import Base
from lowrank.models.checks.isolation import choose_layout
from lowrank.models.config import ModelConfig
from lowrank.objectives import Objective, cpo, dpo, kto, needs, orpo, reward, simpo
from lowrank.segments import CHOSEN, MISMATCHED, REJECTED, Segment, number_the_step
from lowrank.train.engine import Engine
from lowrank.train.new_job import VALUE_HEAD
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.objectives import trl_peers
from tests.tiny_models import VOCABULARY, make_model

Peer = Callable[[Any, Sequence[Segment]], tuple[torch.Tensor, dict[str, float]]]
CASES: dict[str, tuple[Objective, Peer]] = {
    "dpo": (dpo.DPOConfig().build(), lambda m, s: trl_peers.dpo(m, s, {"sigmoid": 1.0}, 0.1)),
    "dpo-hinge": (
        dpo.DPOConfig(loss_type="hinge", beta=0.05).build(),
        lambda m, s: trl_peers.dpo(m, s, {"hinge": 1.0}, 0.05),
    ),
    "dpo-ipo": (dpo.DPOConfig(loss_type="ipo", beta=0.3).build(), lambda m, s: trl_peers.dpo(m, s, {"ipo": 1.0}, 0.3)),
    "dpo-ftx": (
        dpo.DPOConfig(pref_ftx=0.7).build(),
        lambda m, s: trl_peers.dpo(m, s, {"sigmoid": 1.0, "sft": 0.7}, 0.1),
    ),
    "dpo-ld": (
        dpo.DPOConfig(ld_alpha=0.4).build(),
        lambda m, s: trl_peers.dpo(m, s, {"sigmoid": 1.0}, 0.1, ld_alpha=0.4),
    ),
    "simpo": (
        simpo.SimPOConfig(beta=2.0, gamma=0.5).build(),
        lambda m, s: trl_peers.cpo(m, s, loss_type="simpo", beta=2.0, simpo_gamma=0.5, cpo_alpha=0.0),
    ),
    "cpo": (cpo.CPOConfig().build(), lambda m, s: trl_peers.cpo(m, s)),
    "cpo-hinge": (
        cpo.CPOConfig(loss_type="hinge", beta=0.02, alpha=0.3).build(),
        lambda m, s: trl_peers.cpo(m, s, loss_type="hinge", beta=0.02, cpo_alpha=0.3),
    ),
    "cpo-ipo": (cpo.CPOConfig(loss_type="ipo").build(), lambda m, s: trl_peers.cpo(m, s, loss_type="ipo")),
    "cpo-smoothed": (
        cpo.CPOConfig(label_smoothing=0.2).build(),
        lambda m, s: trl_peers.cpo(m, s, label_smoothing=0.2),
    ),
    "kto": (kto.KTOConfig().build(), lambda m, s: trl_peers.kto(m, s, 0.1, (1.0, 1.0))),
    "kto-weighted": (
        kto.KTOConfig(beta=0.4, desirable_weight=1.3, undesirable_weight=0.6).build(),
        lambda m, s: trl_peers.kto(m, s, 0.4, (1.3, 0.6)),
    ),
}


def rows(objective: Objective, seed: int, prompt: int | None = None) -> list[Segment]:
    """Random prompts and answers; the two of a pair share their prompt."""
    generator = np.random.default_rng(seed)

    def segment(prompt_L: np.ndarray, answer: int, **place: int) -> Segment:
        token_L = np.concatenate([prompt_L, generator.integers(3, VOCABULARY, answer)])
        weight_L = np.concatenate([np.zeros(len(prompt_L)), np.ones(answer)]).astype(np.float32)
        reference_L = weight_L * generator.normal(-np.log(VOCABULARY), 0.5, len(token_L))
        return Segment(token_L, weight_L, **place, reference_L=reference_L.astype(np.float32))

    segments = []
    for pair in range(5):
        prompt_L = generator.integers(3, VOCABULARY, prompt or generator.integers(2, 8))
        chosen, rejected = generator.integers(1, 12, 2)
        if needs(objective, "mismatched"):
            segments.append(segment(prompt_L, chosen, role=CHOSEN if pair % 3 else REJECTED))
            segments.append(segment(prompt_L, rejected, role=MISMATCHED))
        else:
            segments += [segment(prompt_L, chosen, pair=pair, role=CHOSEN)]
            segments += [segment(prompt_L, rejected, pair=pair, role=REJECTED)]
    return number_the_step(segments)


def compare(model: Any, objective: Objective, peer: Peer, segments: list[Segment], tolerance: float = 1e-5) -> None:
    """Loss, metrics, and the gradient of every parameter of the model; ours cut into several batches."""
    theirs = copy.deepcopy(model).requires_grad_(True)
    loss, metrics = peer(theirs, segments)
    loss.backward()
    engine = engine_for(model, objective, max(map(len, segments)) * 3)
    assert len(engine.micro_batches({BASE_SLOT: segments})) > 1
    forwarded = engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT]
    assert forwarded.loss == pytest.approx(loss.item(), rel=tolerance)
    shared = metrics.keys() & forwarded.metrics.keys()
    assert shared >= {"rewards/chosen", "rewards/rejected", "rewards/margins"}
    assert {name: forwarded.metrics[name] for name in shared} == pytest.approx(
        {name: metrics[name] for name in shared},
        rel=1e-4,
        abs=1e-4,  # TRL sums float32 log-probabilities
    )
    compare_gradients(engine, theirs, tolerance)


def engine_for(model: Any, objective: Objective, micro_batch_tokens: int) -> Engine:
    base = Base(copy.deepcopy(model).requires_grad_(True), None, "tiny")
    choose_layout(base, "auto")
    engine = Engine(base, Bank(base), micro_batch_tokens)
    engine.add(BASE_SLOT, objective, AdamWConfig(), seed=0, neftune_alpha=0.0)
    return engine


def compare_gradients(engine: Engine, theirs: Any, tolerance: float) -> None:
    expected = {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, parameter in engine.jobs[BASE_SLOT].parameters.items():
        if name in expected:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected.pop(name), rtol=0, atol=tolerance * scale)
    assert not expected or expected.keys() == {"score.weight"}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", torch.float32, initializer_range=0.2, tie_word_embeddings=False)


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(model: Any, name: str) -> None:
    objective, peer = CASES[name]
    compare(model, objective, peer, rows(objective, 0))


def test_orpo_equals_trl(model: Any) -> None:
    """TRL's NLL has the prompt in it, so the prompts here are a single token, which nothing predicts."""
    objective = orpo.ORPOConfig(beta=0.3).build()
    compare(model, objective, lambda m, s: trl_peers.orpo(m, s, 0.3), rows(objective, 0, prompt=1))


def test_dpo_label_smoothing_is_cpos_with_references_taken_off(model: Any) -> None:
    """TRL's DPO dropped it; its CPO has the same form over other numbers."""
    segments = rows(dpo.DPOConfig().build(), 0)
    zero = [replace(segment, reference_L=np.zeros_like(segment.reference_L)) for segment in segments]
    peer = lambda m, s: trl_peers.cpo(m, s, label_smoothing=0.2, cpo_alpha=0.0)  # noqa: E731
    compare(model, dpo.DPOConfig(label_smoothing=0.2).build(), peer, zero)


@pytest.mark.parametrize("center", [None, 0.05])
def test_reward_equals_trl(model: Any, center: float | None) -> None:
    objective = reward.RewardConfig(center_rewards_coefficient=center or 0.0).build()
    segments = rows(objective, 0)
    engine = engine_for(model, objective, 40)
    value_D = engine.jobs[BASE_SLOT].parameters[VALUE_HEAD]
    theirs = transformers.LlamaForSequenceClassification(model.config)
    theirs.config.num_labels = theirs.num_labels = 1
    theirs.score = torch.nn.Linear(len(value_D), 1, bias=False)
    theirs.model = copy.deepcopy(model.model).requires_grad_(True)
    with torch.no_grad():
        theirs.score.weight.copy_(value_D[None])
    loss, metrics = trl_peers.reward(theirs, segments, center)
    loss.backward()
    forwarded = engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT]
    assert forwarded.loss == pytest.approx(loss.item(), rel=1e-5)
    assert forwarded.metrics["rewards/accuracies"] == pytest.approx(metrics["accuracy"])
    assert forwarded.metrics["rewards/margins"] == pytest.approx(metrics["margin"], rel=1e-4)
    assert value_D.grad is not None
    torch.testing.assert_close(value_D.grad, theirs.score.weight.grad[0], rtol=1e-5, atol=1e-6)
    compare_gradients(engine, theirs, 1e-5)


REAL = [(file, name) for file in ("dpo_en_demo", "dpo_zh_demo") for name in CASES if not name.startswith("kto")]
REAL += [("kto_en_demo", name) for name in CASES if name.startswith("kto")]
QUICK = [("kto_en_demo", "kto")]
"""Of the real rows, what the default suite has time for; `make test-slow` runs them all."""


@pytest.mark.parametrize(
    ("file", "name"), [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in REAL]
)
def test_equals_trl_on_real_rows(shared_data: Path, file: str, name: str) -> None:
    """Rows of the demo files as the shipped base tokenizes them; the references are those of other weights."""
    objective, peer = CASES[name]
    tokenizer = loading.load_tokenizer(ModelConfig(path="lowrank/tiny"))
    data = prepare(
        DataConfig(train=[str(shared_data / f"{file}.json")], max_samples=40, batch_size=6, max_length=256),
        tokenizer=tokenizer,
        record=objective.record,
        mismatched=needs(objective, "mismatched"),
        seed=0,
    )
    segments = data.train.next_step()
    folder = Path(loading.locate("lowrank/tiny"))
    shipped = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    policy = copy.deepcopy(shipped)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.parameters():
            parameter += 0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    engine = engine_for(shipped, objective, 2000)
    scored = engine.logprobs(BASE_SLOT, segments)
    segments = [replace(segment, reference_L=logprob_L) for segment, logprob_L in zip(segments, scored)]
    compare(policy, objective, peer, segments)
