"""GRPO piece by piece against TRL: advantages, the loss with its gradients and metrics, rewards."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import lowrank.models.loading.pretrained as loading
from lowrank.batches import BASE_SLOT
from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.errors import ConfigError
from lowrank.models.config import ModelConfig
from lowrank.objectives.grpo import GRPOConfig
from lowrank.objectives.rollout import call_reward_function, group_advantages, per_token_kl
from lowrank.records import Conversation, Prompted
from lowrank.segments import Segment, number_the_step
from tests.objectives import trl_peers
from tests.objectives.test_trl import compare_gradients, engine_for
from tests.tiny_models import VOCABULARY, make_model

pytestmark = pytest.mark.usefixtures("allowed_code")

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {"loss_type": "bnpo"}),
    "grpo": ({"loss_type": "grpo"}, {"loss_type": "grpo"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 16}, {"loss_type": "dr_grpo"}),
    "kl": ({"loss_type": "grpo", "beta": 0.3}, {"loss_type": "grpo", "beta": 0.3}),
    "again": ({"num_iterations": 2}, {}),
    "again-high": (
        {"num_iterations": 3, "epsilon": 0.1, "epsilon_high": 0.4, "beta": 0.04},
        {"epsilon_low": 0.1, "epsilon_high": 0.4, "beta": 0.04},
    ),
    "two-sided": ({"num_iterations": 2, "delta": 1.3}, {"delta": 1.3}),
    "gspo": (
        {"num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.02},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon_low": 0.02, "epsilon_high": 0.02},
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama", torch.float32, initializer_range=0.2, tie_word_embeddings=False)


def answers(seed: int, again: bool, near: list[np.ndarray] | None = None) -> list[Segment]:
    """Random prompts with random answers, advantages, and (`again`) probabilities of an earlier model."""
    generator, other = np.random.default_rng(seed), np.random.default_rng(seed + 100)
    segments = []
    for index in range(8):
        prompt, answer = generator.integers(2, 8), generator.integers(1, 12)
        weight_L = np.r_[np.zeros(prompt), np.ones(answer)].astype(np.float32)
        token_L = generator.integers(3, VOCABULARY, prompt + answer)
        signals = {"advantage": (weight_L * generator.normal()).astype(np.float32)}
        if again:
            now_L = -np.log(VOCABULARY) if near is None else near[index]
            signals["logprob"] = (weight_L * (now_L + other.normal(0, 0.3, len(token_L)))).astype(np.float32)
        reference_L = (weight_L * generator.normal(-np.log(VOCABULARY), 0.5, len(token_L))).astype(np.float32)
        segments.append(Segment(token_L, weight_L, reference_L=reference_L, signals_L=signals))
    return number_the_step(segments)


def compare(model: Any, ours: dict[str, Any], theirs: dict[str, Any], segments: list[Segment], size: int) -> None:
    objective = GRPOConfig(**ours).build()
    peer = copy.deepcopy(model).requires_grad_(True)
    loss, metrics = trl_peers.grpo(peer, segments, **theirs)
    loss.backward()
    engine = engine_for(model, objective, size)
    assert len(engine.micro_batches({BASE_SLOT: segments})) > 1
    forwarded = engine.forward_backward({BASE_SLOT: segments})[BASE_SLOT]
    assert forwarded.loss == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"] + ["kl"] * ("beta" in ours)
    if ours.get("importance_sampling_level") == "sequence":
        names = []  # TRL counts answers there, not tokens
    for name in names:
        assert forwarded.metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name
    if "num_iterations" in ours and names:
        assert forwarded.metrics["clip_ratio/region_mean"] > 0
    compare_gradients(engine, peer, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(model: Any, name: str) -> None:
    ours, theirs = CASES[name]
    again = "num_iterations" in ours
    segments = answers(0, False)
    near = engine_for(model, GRPOConfig().build(), 400).logprobs(BASE_SLOT, segments)
    compare(model, ours, theirs, answers(0, again, near), 40)


def test_truncated_answers_that_are_masked_count_as_in_trl(model: Any) -> None:
    segments = answers(1, False)
    segments[2] = replace(segments[2], weight_L=np.zeros_like(segments[2].weight_L))
    for loss_type in ("grpo", "dapo"):
        compare(model, {"loss_type": loss_type}, {"loss_type": loss_type}, segments, 40)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale: str) -> None:
    generator = np.random.default_rng(0)
    reward_NF = generator.normal(size=(24, 3))
    reward_NF[3, 1] = reward_NF[8, 0] = np.nan
    reward_NF[[5, 12, 13, 14, 15]] = np.nan  # nobody has an opinion: one answer, a whole group
    reward_NF[20:24] = 0.5  # all alike
    weight_F = np.array([1.0, 0.3, 2.0])
    expected = trl_peers.grpo_advantages(torch.tensor(reward_NF), torch.tensor(weight_F), 4, scale)
    total_N = np.where(np.isnan(reward_NF).all(1), np.nan, np.nansum(reward_NF * weight_F, axis=1))
    found_N, _ = group_advantages(total_N, 4, scale)
    np.testing.assert_allclose(found_N, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert np.abs(found_N[:4]).min() > 0
    assert np.all(found_N[20:24] == 0)


def test_kl_is_never_negative_and_unbiased() -> None:
    """Over draws from p its mean is KL(p | q)."""
    p_V, q_V = (torch.randn(50, generator=torch.Generator().manual_seed(seed)).log_softmax(0) for seed in (0, 1))
    estimate_V = per_token_kl(p_V.double(), q_V.double())
    assert estimate_V.min() >= 0
    expected = (p_V.double().exp() * (p_V.double() - q_V.double())).sum()
    assert (p_V.double().exp() * estimate_V).sum() == pytest.approx(float(expected), rel=1e-6)


def test_equals_trl_on_answers_of_the_shipped_base() -> None:
    """Rows of the demo as the base reads them, with the answers of the data; float64 on both sides."""
    tokenizer = loading.load_tokenizer(ModelConfig(path="lowrank/tiny"))
    data = DataConfig(train=["lowrank/demo"], max_samples=8, batch_size=8)
    rows = prepare(data, tokenizer=tokenizer, record=Conversation, seed=0).train.next_step()
    generator = np.random.default_rng(0)
    segments = [
        replace(
            row,
            signals_L={"advantage": (row.weight_L * generator.normal()).astype(np.float32)},
            reference_L=(row.weight_L * generator.normal(-2, 0.3, len(row))).astype(np.float32),
        )
        for row in rows
    ]
    shipped = transformers.AutoModelForCausalLM.from_pretrained(
        Path(loading.locate("lowrank/tiny")), dtype=torch.float64
    ).eval()
    compare(shipped, {"beta": 0.1, "loss_type": "grpo"}, {"beta": 0.1, "loss_type": "grpo"}, segments, 200)


def taking_little(completions: list[Any]) -> list[float | None]:
    return [1.0, None]


def too_few(completions: list[Any], **columns: Any) -> list[float]:
    return [1.0]


def failing(**columns: Any) -> list[float]:
    raise KeyError("solution")


def infinite(**columns: Any) -> list[float]:
    return [1.0, float("inf")]


def test_a_reward_function_gets_what_it_takes_and_is_held_to_what_it_gives() -> None:
    arguments = {"completions": ["a", "b"], "prompts": ["x", "y"]}
    place = "tests.objectives.test_grpo"
    found = call_reward_function(f"{place}:taking_little", 2, arguments)
    assert found[0] == 1
    assert np.isnan(found[1])
    for name, described in {
        "too_few": "gave 1 rewards for 2 answers",
        "failing": r"fails: KeyError: 'solution'(.|\n)*prompts",
        "infinite": "infinite reward",
    }.items():
        with pytest.raises(ConfigError, match=described):
            call_reward_function(f"{place}:{name}", 2, arguments)


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ({"reward_funcs": "nowhere:fn"}, "cannot import 'nowhere:fn'"),
        ({"reward_funcs": ["accuracy"]}, "write my_module:fn"),
        ({"reward_funcs": ["json:dumps"], "reward_weights": [1, 2]}, "2 weights for 1 reward_funcs"),
        ({"num_generations": 1}, "num_generations: expected a number at least 2"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], described: str) -> None:
    with pytest.raises(ValueError, match=described):
        GRPOConfig(**settings)


def test_true_and_false_as_in_trl() -> None:
    values: list[Any] = [True, False]
    assert [GRPOConfig(scale_rewards=value).scale_rewards for value in values] == ["group", "none"]
    assert GRPOConfig().build().record is Prompted
