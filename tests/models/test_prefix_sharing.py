"""Answers to one prompt after one computation of it: the same numbers as one by one, on every family that can."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import BASE_SLOT
from lowrank.models.attention.prefix_sharing import tail_of
from lowrank.models.base import Base
from lowrank.models.checks import isolation
from lowrank.objectives.dpo import DPOConfig
from lowrank.objectives.grpo import GRPOConfig
from lowrank.objectives.reward import RewardConfig
from lowrank.objectives.simpo import SimPOConfig
from lowrank.segments import CHOSEN, REJECTED, Segment, number_the_step
from lowrank.train.engine import Engine
from tests.tiny_models import FAMILIES, make_base, make_engine

RELATIVE = ("falcon",)
"""Families that count positions themselves, from the start of the stream: right for documents one after another, since
only distances matter, but not for an answer that stands away from its prompt."""


def answers(seed: int, prompt: int, lengths: tuple[int, ...], pair: int = -1) -> list[Segment]:
    """Answers of these lengths to one prompt."""
    generator = np.random.default_rng(seed)
    requested = generator.integers(3, 97, prompt)
    made = []
    for role, length in zip((CHOSEN, REJECTED, 0, 0), lengths):
        described = generator.integers(3, 97, length)
        weight_L = np.concatenate([np.zeros(prompt), np.ones(length)]).astype(np.float32)
        made.append(Segment(np.concatenate([requested, described]), weight_L, pair, role if pair >= 0 else 0))
    return made


def pairs() -> list[Segment]:
    """Three pairs; the last has nothing in common but one token."""
    made = [*answers(0, 12, (5, 9), 0), *answers(1, 30, (8, 3), 1)]
    return number_the_step([*made, answers(2, 6, (4,), 2)[0], replace(answers(3, 7, (4,), 2)[0], role=REJECTED)])


def reference(segments: list[Segment]) -> list[Segment]:
    generator = np.random.default_rng(9)
    return [
        replace(each, reference_L=-generator.random(len(each)).astype(np.float32) * (each.weight_L != 0))
        for each in segments
    ]


def gradients(engine: Engine, slot: int, segments: list[Segment]) -> tuple[float, dict[str, float], torch.Tensor]:
    job = engine.jobs[slot]
    job.optimizer.zero_grad()
    done = engine.forward_backward({slot: segments})[slot]
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in job.parameters.values()]
    return done.loss, done.metrics, torch.cat([each.flatten() for each in flat])


def engine_of(base: Base, objective: object) -> tuple[Engine, int]:
    engine, (slot,) = make_engine(base, LoraConfig(rank=4))
    settings = engine.jobs[slot].settings
    engine.remove(slot)
    engine.add(slot, objective, settings, seed=0, neftune_alpha=0.0)  # type: ignore[arg-type]
    for parameter in engine.jobs[slot].parameters.values():  # B is zero at the start
        parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    engine.jobs[slot].refresh()
    return engine, slot


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    """Whoever is packed and told positions shares; losses and gradients are those of whole answers."""
    base = make_base(family)
    able = isolation.shares_prompts(base)
    assert able == (base.layout == "packed" and family not in RELATIVE)
    if not able:
        return
    engine, slot = engine_of(base, DPOConfig().build())
    segments = reference(pairs())
    loss, metrics, gradient = gradients(engine, slot, segments)
    engine.shares_prompts = True
    tokens = sum(batch.num_tokens for batch in engine.micro_batches({slot: segments}))
    assert tokens == sum(map(len, segments)) - 11 - 29
    shared_loss, shared_metrics, shared_gradient = gradients(engine, slot, segments)
    assert shared_loss == pytest.approx(loss, rel=1e-9)
    assert shared_metrics == pytest.approx(metrics, rel=1e-9, abs=1e-12)
    assert (shared_gradient - gradient).norm() <= 1e-6 * gradient.norm()  # their norms are in float32


@pytest.mark.parametrize(
    "objective", [RewardConfig(), SimPOConfig(), GRPOConfig(reward_funcs=(), max_completion_length=8)]
)
@pytest.mark.parametrize("micro_batch_tokens", [20, 60, 4096])
def test_objectives_and_cuts(objective: RewardConfig | SimPOConfig | GRPOConfig, micro_batch_tokens: int) -> None:
    """Also four answers to a question; a group that is cut is shared within each part."""
    base = make_base("llama")
    engine, slot = engine_of(base, objective.build())
    segments = pairs()
    if isinstance(objective, GRPOConfig):
        drawn = [*answers(0, 12, (5, 9, 2, 4)), *answers(1, 9, (3, 3, 6, 1))]
        advantages = np.random.default_rng(0).normal(size=len(drawn)).astype(np.float32)
        segments = number_the_step(
            [
                replace(each, signals_L={"advantage": np.full(len(each), value, np.float32)})
                for each, value in zip(drawn, advantages)
            ]
        )
    loss, _, gradient = gradients(engine, slot, segments)
    engine.shares_prompts = True
    engine.micro_batch_tokens = micro_batch_tokens
    if micro_batch_tokens == 4096:
        assert sum(each.num_tokens for each in engine.micro_batches({slot: segments})) < 0.8 * sum(map(len, segments))
    shared_loss, _, shared_gradient = gradients(engine, slot, segments)
    assert shared_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert (shared_gradient - gradient).norm() <= 1e-6 * gradient.norm()  # their norms are in float32


def test_logprobs_of_whole_answers() -> None:
    """What is given back has a place for every token, shared ones included."""
    engine, _ = engine_of(make_base("llama"), DPOConfig().build())
    segments = pairs()
    whole = engine.logprobs(BASE_SLOT, segments)
    engine.shares_prompts = True
    for one, other, segment in zip(engine.logprobs(BASE_SLOT, segments), whole, segments):
        assert len(one) == len(segment)
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_two_jobs_with_the_same_pairs_do_not_share() -> None:
    """A prompt under one adapter is not a prompt under another."""
    base = make_base("llama")
    engine, slots = make_engine(base, LoraConfig(rank=4), LoraConfig(rank=4))
    engine.shares_prompts = True
    (batch,) = engine.micro_batches(dict.fromkeys(slots, pairs()))
    for slot in slots:
        assert [bool(each) for each in batch.of_slot(slot).prefixes] == [False, True, False, True, False, False]


def test_dropout_counts_where_it_counted() -> None:
    """Draws of a token are those it has when the answer is whole."""
    base = make_base("llama")
    engine, (slot,) = make_engine(base, LoraConfig(rank=4))
    (whole,) = engine.micro_batches({slot: pairs()})
    engine.shares_prompts = True
    (shared,) = engine.micro_batches({slot: pairs()})
    counters, ours = base.rows(whole), base.rows(shared)
    assert len(set(ours.counter_N.tolist())) == ours.num_rows
    places = {int(counter): int(length) for counter, length in zip(counters.counter_N, counters.length_N)}
    assert all(places[int(counter)] == length for counter, length in zip(ours.counter_N, ours.length_N))


def test_what_is_shared() -> None:
    chosen, rejected = answers(0, 12, (5, 9), 0)
    tail = tail_of(rejected, chosen)
    assert (tail.prefix, len(tail)) == (11, 10)  # the first token of the answer is predicted from the prompt's last
    assert tail_of(replace(rejected, pair=1), chosen) is not tail
    assert tail_of(replace(rejected, pair=1), chosen).prefix == 0
    learned = replace(rejected, weight_L=np.ones(len(rejected), np.float32))
    assert tail_of(learned, chosen).prefix == 0
    assert tail_of(chosen, chosen).prefix == 11
    long = answers(5, 4, (5, 200), 0)
    assert tail_of(long[1], long[0]).prefix == 0, "three tokens of two hundred are not worth the gathering"
    short = replace(rejected, token_L=rejected.token_L[:12], weight_L=rejected.weight_L[:12])  # an empty answer
    assert tail_of(short, chosen).prefix == 10


def test_one_pair_never_moves_another_not_even_with_nan() -> None:
    """Bit by bit."""
    base = make_base("llama", torch.float32)
    engine, slot = engine_of(base, SimPOConfig().build())
    engine.shares_prompts = True
    (batch,) = engine.micro_batches({slot: number_the_step([*answers(0, 12, (5, 9), 0), *answers(1, 20, (3, 4), 1)])})
    first = sum(batch.lengths[:2])
    clean_TD = engine.bank.hidden(batch).detach()

    def spoil(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(1, torch.arange(first), float("nan"))

    hook = base.model.get_input_embeddings().register_forward_hook(spoil)
    broken_TD = engine.bank.hidden(batch).detach()
    hook.remove()
    assert broken_TD[:first].isnan().all()
    assert torch.equal(clean_TD[first:], broken_TD[first:])
