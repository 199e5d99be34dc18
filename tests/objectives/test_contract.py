"""The contract of objectives. A new file in objectives/ is tested by being there."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.batches import Batch, Scores, Totals, pack
from lowrank.objectives import needs
from lowrank.objectives.sft import SFTConfig
from lowrank.records import Preference, Rated, Record
from lowrank.segments import CHOSEN, MISMATCHED, PLAIN, REJECTED, Segment, number_the_step
from lowrank.settings import configs_in
from lowrank.train.engine import Engine
from lowrank.train.optimizers.adamw import AdamWConfig
from tests.tiny_models import VOCABULARY, make_base, make_engine

OBJECTIVES: dict[str, Any] = configs_in("lowrank.objectives")
LENGTHS = [5, 12, 9, 3, 17, 8, 11, 6]

every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def step_for(objective: Any, seed: int) -> list[Segment]:
    """One optimizer step of what the objective learns from, with what it needs."""
    generator = np.random.default_rng(seed)
    segments = []
    for index, length in enumerate(LENGTHS):
        pair, role = -1, PLAIN
        if objective.record is Preference:
            pair, role = index // 2, CHOSEN if index % 2 == 0 else REJECTED
        elif objective.record is Rated:
            role = CHOSEN if index % 3 else REJECTED
        segments.append(_random_segment(generator, length, pair=pair, role=role))
        if needs(objective, "mismatched"):
            segments.append(_random_segment(generator, length + 2, role=MISMATCHED))
    if needs(objective, "rollouts"):
        segments = [replace(segment, signals_L=_random_signals(generator, segment)) for segment in segments]
    if needs(objective, "reference") or getattr(objective, "needs_reference", False):
        segments = [replace(segment, reference_L=_random_reference(generator, segment)) for segment in segments]
    return number_the_step(segments)


def _random_segment(generator: np.random.Generator, length: int, **place: int) -> Segment:
    weight_L = (generator.random(length) < 0.6).astype(np.float32)
    weight_L[0], weight_L[-1] = 0.0, 1.0
    return Segment(generator.integers(3, VOCABULARY, length), weight_L, **place)


def _random_reference(generator: np.random.Generator, segment: Segment) -> np.ndarray:
    """Around what random models think."""
    return np.where(segment.weight_L != 0, generator.normal(-np.log(VOCABULARY), 1.0, len(segment)), 0.0)


def _random_signals(generator: np.random.Generator, segment: Segment) -> dict[str, np.ndarray]:
    """Everything that any objective on the model's own answers finds out."""
    carried_L = (segment.weight_L != 0).astype(np.float32)
    drawn = {name: (carried_L * generator.normal()).astype(np.float32) for name in ("advantage", "value", "return")}
    return {**drawn, "logprob": _random_reference(generator, segment).astype(np.float32)}


def counted(objective: Any, batch: Batch) -> Totals:
    """The totals of a step of one batch; what is observed is made up."""
    observed = {"mismatched": 2.0, "mismatched_ratio": 0.5} if needs(objective, "mismatched") else {}
    return objective.count(batch) | observed


def engine_for(name: str, micro_batch_tokens: int = 4096) -> tuple[Engine, list[int]]:
    """Slot 0 has the objective under test, slot 1 is somebody else's SFT; adapters are away from their start."""
    engine, slots = make_engine(
        make_base("llama"), LoraConfig(rank=4), LoraConfig(rank=2), micro_batch_tokens=micro_batch_tokens
    )
    engine.add(slots[0], OBJECTIVES[name]().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    for slot in slots:
        generator = torch.Generator().manual_seed(slot)
        for parameter in engine.bank.parameters(slot).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return engine, slots


def gradients(engine: Engine, slot: int) -> dict[str, torch.Tensor]:
    parameters = engine.jobs[slot].parameters
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


@every_objective
def test_says_what_it_learns_from_and_documents_its_settings(name: str) -> None:
    config = OBJECTIVES[name]
    objective = config().build()
    assert objective.record in get_args(Record)
    assert config.__doc__
    for field, info in config.model_fields.items():
        assert field == "type" or info.description, field


@every_objective
def test_counting_needs_no_model_and_adds_up(name: str) -> None:
    objective = OBJECTIVES[name]().build()
    segments = [segment for segment in step_for(objective, 0) if segment.role != MISMATCHED]
    whole = objective.count(pack([(0, segment) for segment in segments]))
    halves = [objective.count(pack([(0, segment) for segment in half])) for half in (segments[:4], segments[4:])]
    assert whole
    for key, value in whole.items():
        assert type(value) is float
        assert value == pytest.approx(sum(half.get(key, 0.0) for half in halves))


@every_objective
def test_the_loss_is_a_scalar_with_a_gradient_and_leaves_its_inputs_alone(name: str) -> None:
    objective = OBJECTIVES[name]().build()
    segments = [segment for segment in step_for(objective, 0) if segment.role != MISMATCHED]
    batch = pack([(0, segment) for segment in segments])
    before = copy.deepcopy(batch)
    before_T = -torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0)) * (batch.weight_T != 0)
    logprob_T = before_T.clone().requires_grad_()
    value_S = torch.linspace(-1, 1, len(segments)).requires_grad_() if needs(objective, "value") else None
    value_T = torch.linspace(-1, 1, batch.num_tokens).requires_grad_() if needs(objective, "token_values") else None
    scores = Scores(logprob_T, batch.reference_T, value_S, value_T)
    loss, metrics = objective.loss(scores, batch, counted(objective, batch))
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    if value_S is not None:
        assert value_S.grad is not None
        assert value_S.grad.abs().min() > 0
        assert logprob_T.grad is None
    else:
        assert logprob_T.grad is not None
        assert logprob_T.grad[batch.weight_T != 0].abs().sum() > 0
        assert logprob_T.grad[batch.weight_T == 0].abs().sum() == 0
    assert torch.equal(logprob_T.detach(), before_T)
    assert all(isinstance(value, (float, torch.Tensor)) for value in metrics.values())
    assert before.signals_T.keys() == batch.signals_T.keys()
    assert all(torch.equal(value, batch.signals_T[key]) for key, value in before.signals_T.items())
    for key, value in vars(before).items():
        if key == "signals_T":
            continue
        same = (
            torch.equal(value, getattr(batch, key)) if isinstance(value, torch.Tensor) else value == getattr(batch, key)
        )
        assert same, key


@every_objective
def test_cutting_changes_nothing(name: str) -> None:
    """Loss, metrics and gradients of a step in 1, 2 and 4 or more micro-batches."""
    outcomes = []
    for micro_batch_tokens, least in ((4096, 1), (40, 2), (20, 4)):
        engine, (slot, _) = engine_for(name, micro_batch_tokens)
        work = {slot: step_for(engine.jobs[slot].objective, 1)}
        assert len(engine.micro_batches(work)) >= least
        forwarded = engine.forward_backward(work)[slot]
        outcomes.append((forwarded, gradients(engine, slot)))
    (whole, expected), *others = outcomes
    assert whole.loss != 0
    for forwarded, own in others:
        assert forwarded.loss == pytest.approx(whole.loss, rel=1e-12)
        assert forwarded.totals == pytest.approx(whole.totals)
        assert forwarded.metrics == pytest.approx(whole.metrics, rel=1e-6)
        for key, value in own.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-13)


@every_objective
def test_other_jobs_do_not_notice(name: str) -> None:
    """An SFT job beside it has the same loss and gradients as alone, and the objective the same as without it."""
    engine, (mine, other) = engine_for(name)
    own = step_for(engine.jobs[mine].objective, 1)
    theirs = step_for(SFTConfig().build(), 2)
    together = engine.forward_backward({mine: own, other: theirs})
    both = {slot: gradients(engine, slot) for slot in (mine, other)}
    for slot, work in ((mine, own), (other, theirs)):
        alone_engine, _ = engine_for(name)
        alone = alone_engine.forward_backward({slot: work})[slot]
        assert together[slot].loss == pytest.approx(alone.loss, rel=1e-12)
        for key, value in gradients(alone_engine, slot).items():
            torch.testing.assert_close(both[slot][key], value, rtol=1e-10, atol=1e-13)
    engine, (mine, other) = engine_for(name)
    engine.forward_backward({mine: own})
    assert not gradients(engine, other)


@every_objective
def test_nothing_to_learn_is_zero_and_not_nan(name: str) -> None:
    """A step whose every token is masked."""
    engine, (slot, _) = engine_for(name)
    if needs(engine.jobs[slot].objective, "value"):
        pytest.skip("it learns from whole answers, whatever their tokens weigh")
    masked = [
        replace(segment, weight_L=np.zeros_like(segment.weight_L))
        for segment in step_for(engine.jobs[slot].objective, 1)
    ]
    forwarded = engine.forward_backward({slot: masked})[slot]
    assert np.isfinite(forwarded.loss)
    for value in gradients(engine, slot).values():
        assert value.abs().max() == 0


@every_objective
def test_evaluation_says_what_training_says(name: str) -> None:
    """The same loss and metrics over the same rows, whatever else is evaluated; nothing keeps a gradient."""
    engine, (slot, other) = engine_for(name)
    work = {slot: step_for(engine.jobs[slot].objective, 1), other: step_for(SFTConfig().build(), 2)}
    evaluated = engine.evaluate(work)[slot]
    assert not gradients(engine, slot)
    trained = engine.forward_backward(work)[slot]
    assert evaluated.loss == pytest.approx(trained.loss, rel=1e-12)
    assert evaluated.metrics == pytest.approx(trained.metrics, rel=1e-9)
    assert evaluated.totals == pytest.approx(trained.totals)


@every_objective
def test_a_job_that_becomes_nan_beside_it_is_not_noticed(name: str) -> None:
    engine, (slot, other) = engine_for(name)
    own = step_for(engine.jobs[slot].objective, 1)
    alone, expected = engine.forward_backward({slot: own})[slot], gradients(engine, slot)
    engine, (slot, other) = engine_for(name)
    with torch.no_grad():
        for parameter in engine.bank.parameters(other).values():
            parameter.fill_(float("nan"))
    beside = engine.forward_backward({slot: own, other: step_for(SFTConfig().build(), 2)})[slot]
    assert beside.loss == pytest.approx(alone.loss, rel=1e-12)
    assert beside.metrics == pytest.approx(alone.metrics, rel=1e-9)
    for key, value in gradients(engine, slot).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_token_loss_by_hand(name: str) -> None:
    """Two documents: (0.5 ln 2 + ln 4 + 2 ln 8) / 3.5, the weight on each prediction, once over all tokens."""
    objective = OBJECTIVES[name]().build()
    one = Segment(np.array([5, 6, 7]), np.array([0.0, 0.5, 1.0], np.float32))
    other = Segment(np.array([8, 9]), np.array([0.0, 2.0], np.float32))
    batch = pack([(0, one), (0, other)])
    logprob_T = torch.log(torch.tensor([1 / 2, 1 / 4, 1.0, 1 / 8, 1.0]))
    loss, metrics = objective.loss(Scores(logprob_T), batch, objective.count(batch))
    assert objective.count(batch) == {"tokens": 3.5}
    assert loss.item() == pytest.approx((0.5 * np.log(2) + np.log(4) + 2 * np.log(8)) / 3.5)
    assert metrics == {}


@pytest.mark.parametrize("name", ["sft", "pretrain"])
def test_token_loss_is_transformers_cross_entropy(name: str) -> None:
    """A whole model's own `labels=` loss, over documents of different length, token-weighted."""
    engine, _ = make_engine(make_base("llama"), LoraConfig(rank=4))
    engine.add(0, OBJECTIVES[name]().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
    segments = step_for(engine.jobs[0].objective, 3)
    total, tokens = 0.0, 0
    for segment in segments:
        token_1T = torch.from_numpy(segment.token_L)[None]
        label_1T = torch.where(torch.from_numpy(segment.weight_L)[None] > 0, token_1T, -100)
        with torch.no_grad(), engine.base.using_attention(engine.base.own_attention):
            loss = engine.base.model(input_ids=token_1T, labels=label_1T).loss
        count = int((label_1T[:, 1:] >= 0).sum())
        total, tokens = total + float(loss) * count, tokens + count
    forwarded = engine.evaluate({0: segments})[0]
    assert forwarded.loss == pytest.approx(total / tokens, rel=1e-6)
    assert forwarded.totals["tokens"] == tokens
