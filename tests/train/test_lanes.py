"""Lanes: a step's gradients, losses and metrics have the same bits on any number of ranks that share them."""

from __future__ import annotations

import random
import threading
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lowrank.adapters.variants.adalora import AdaLoraConfig
from lowrank.adapters.variants.dora import DoraConfig
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.adapters.variants.prompt_tuning import PromptTuningConfig
from lowrank.batches import BASE_SLOT
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.objectives import cpo, dpo, kto, orpo, pretrain, reward, sft, simpo
from lowrank.ranks import ALONE, Ranks, by_halves
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.lanes import ManyLanes, OneLane, assign_units
from lowrank.train.micro_batching import units
from lowrank.train.optimizers.adamw import AdamWConfig
from lowrank.train.rollout_generator import RolloutGenerator
from tests.objectives.test_contract import step_for
from tests.tiny_models import make_base, make_engine
from tests.train.rank_threads import on_ranks

JOBS: dict[str, tuple[Any, Any]] = {
    "sft": (LoraConfig(rank=4, dropout=0.2), sft.SFTConfig()),
    "dora": (DoraConfig(rank=4), pretrain.PretrainConfig()),
    "adalora": (AdaLoraConfig(), sft.SFTConfig()),
    "prompt": (PromptTuningConfig(num_virtual_tokens=3), sft.SFTConfig()),
    "dpo": (LoraConfig(rank=2), dpo.DPOConfig()),
    "kto": (LoraConfig(rank=2), kto.KTOConfig()),
    "orpo": (LoraConfig(rank=2), orpo.ORPOConfig()),
    "cpo": (LoraConfig(rank=2), cpo.CPOConfig()),
    "simpo": (LoraConfig(rank=2), simpo.SimPOConfig()),
    "reward": (LoraConfig(rank=2), reward.RewardConfig()),
}
STEPS = 3


_making = threading.Lock()
"""Random weights come from a generator that all threads have in common."""


def new_engine(micro_batch_tokens: int, dtype: torch.dtype = torch.float64) -> Engine:
    with _making:
        return make_engine(make_base("llama", dtype=dtype), micro_batch_tokens=micro_batch_tokens)[0]


def train(ranks: Ranks, lanes: int) -> dict[str, Any]:
    """All jobs together: numbers, and the tensors of each at the end."""
    engine = new_engine(60, torch.float32)
    engine.lanes = OneLane() if lanes == 1 else ManyLanes(ranks, lanes)
    slots = {}
    for seed, (name, (adapter, objective)) in enumerate(JOBS.items()):
        slots[name] = engine.bank.add(adapter, seed=seed)
        engine.add(slots[name], objective.build(), AdamWConfig(), seed=seed, neftune_alpha=5.0 * (name == "dora"),
                   num_steps=STEPS)  # fmt: skip
    numbers: dict[str, list[Any]] = {name: [] for name in JOBS}
    for step in range(STEPS):
        work = _work(engine, slots, step)
        forwarded = engine.forward_backward(work)
        for name, slot in slots.items():
            updated = engine.optim_step(slot, 1e-2)
            numbers[name] += [forwarded[slot].loss, forwarded[slot].metrics, forwarded[slot].totals, updated.grad_norm]
    held_out = _work(engine, slots, 99)
    evaluated = engine.evaluate(held_out, by_row=list(slots.values()))
    for name, slot in slots.items():
        numbers[name] += [evaluated[slot].loss, evaluated[slot].metrics, evaluated[slot].rows]
    numbers["logprobs"] = [each.tolist() for each in engine.logprobs(slots["dpo"], held_out[slots["dpo"]])]
    numbers["bare"] = [each.tolist() for each in engine.logprobs(BASE_SLOT, held_out[slots["sft"]])]
    numbers["values"] = [each.tolist() for each in engine.values(slots["reward"], held_out[slots["reward"]])]
    tensors = {
        name: {key: value.detach().clone() for key, value in engine.jobs[slot].parameters.items()}
        for name, slot in slots.items()
    }
    return {"numbers": numbers, "tensors": tensors}


@cache
def train_alone(lanes: int) -> dict[str, Any]:
    return train(ALONE, lanes)


def _work(engine: Engine, slots: dict[str, int], step: int) -> dict[int, list[Segment]]:
    return {
        slot: step_for(engine.jobs[slot].objective, 100 * step + place) for place, slot in enumerate(slots.values())
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return repr(one["numbers"]) == repr(other["numbers"]) and all(
        torch.equal(one["tensors"][name][key], value)
        for name, tensors in other["tensors"].items()
        for key, value in tensors.items()
    )


@pytest.mark.parametrize("world", [2, 4])
def test_bits_do_not_depend_on_the_number_of_ranks(world: int) -> None:
    alone = train_alone(4)
    for found in on_ranks(world, lambda ranks: train(ranks, 4)):
        assert same(alone, found)


def test_lanes_change_nothing_but_rounding() -> None:
    whole, divided = train_alone(1), train_alone(4)
    assert not same(whole, divided), "or nothing was divided"
    for name, (adapter, _) in JOBS.items():
        if isinstance(adapter, AdaLoraConfig):
            continue  # which ranks it gives up turns on the last bits
        losses = [each for each in whole["numbers"][name] if isinstance(each, float)]
        assert losses == pytest.approx([each for each in divided["numbers"][name] if isinstance(each, float)], rel=1e-4)
        rows, others = whole["numbers"][name][-1], divided["numbers"][name][-1]
        assert rows.counts == others.counts
        assert rows.loss_terms == pytest.approx(others.loss_terms, rel=1e-3, abs=1e-5)
    for name in ("logprobs", "bare", "values"):
        assert [pytest.approx(each, rel=1e-3, abs=1e-5) for each in whole["numbers"][name]] == divided["numbers"][name]


def test_answers_do_not_depend_on_the_number_of_ranks() -> None:
    """Each rank answers its lanes; all know all answers, which are those of one rank with as many lanes."""

    def answers(ranks: Ranks) -> list[list[int]]:
        engine = new_engine(4096, torch.float32)
        rollout_generator = RolloutGenerator(engine.base, engine.bank, ManyLanes(ranks, 2))
        rollout_generator.reserve(24)
        submitted = []
        for place in range(8):
            config = GenerationConfig(max_new_tokens=4 + place, temperature=1.0, seed=place)
            prompt = Prompt(np.arange(3 + place // 2) + 5)  # two of each
            submitted.append(rollout_generator.submit(prompt, config, frozenset()))
        rollout_generator.finish()
        assert [len(each.answer.tokens) for each in submitted] == [4 + place for place in range(8)]
        return [each.answer.tokens for each in submitted]

    alone = answers(ALONE)
    assert on_ranks(2, answers) == [alone, alone]
    assert len({tuple(tokens[:4]) for tokens in alone}) > 4


def test_one_sum_a_step() -> None:
    """Gradients travel once, however many passes a step takes."""

    def steps(ranks: Any) -> list[int]:
        engine = new_engine(20)
        engine.lanes = ManyLanes(ranks, 2)
        slot = engine.bank.add(LoraConfig(rank=4), seed=0)
        engine.add(slot, sft.SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
        engine.forward_backward({slot: step_for(engine.jobs[slot].objective, 0)})
        numbers = sum(each.numel() for each in engine.jobs[slot].parameters.values())
        assert ranks.sums == [numbers + len(engine.jobs[slot].parameters)]
        return ranks.sums

    assert len(on_ranks(2, steps)) == 2


def test_a_rank_without_memory_cuts_smaller_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for it, and all have what they would have had."""

    def steps(ranks: Any, fails: bool) -> tuple[int, dict[str, torch.Tensor]]:
        engine = new_engine(4096)
        engine.lanes = ManyLanes(ranks, 2)
        notices: list[str] = []
        engine.notify = notices.append
        slot = engine.bank.add(LoraConfig(rank=4), seed=0)
        engine.add(slot, sft.SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
        hidden, failed = engine.base.hidden, []

        def short(batch: Any, *given: Any, **named: Any) -> torch.Tensor:
            if fails and ranks.rank == 1 and not failed:
                failed.append(batch)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return hidden(batch, *given, **named)

        monkeypatch.setattr(engine.base, "hidden", short)
        engine.forward_backward({slot: step_for(engine.jobs[slot].objective, 0)})
        engine.optim_step(slot, 1e-2)
        assert len(notices) == (fails and ranks.rank == 1)
        return engine.micro_batch_tokens, {k: v.detach() for k, v in engine.jobs[slot].parameters.items()}

    (whole, expected), _ = on_ranks(2, lambda ranks: steps(ranks, False))
    (first, one), (second, other) = on_ranks(2, lambda ranks: steps(ranks, True))
    assert first == whole
    assert second < whole
    for name, value in expected.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-6, atol=1e-9)


def test_nan_on_one_rank_is_everybodys() -> None:
    def steps(ranks: Any) -> tuple[bool, float]:
        engine = new_engine(4096)
        engine.lanes = ManyLanes(ranks, 2)
        slot = engine.bank.add(LoraConfig(rank=4), seed=0)
        engine.add(slot, sft.SFTConfig().build(), AdamWConfig(), seed=0, neftune_alpha=0.0)
        objective: Any = engine.jobs[slot].objective
        loss = objective.loss
        if ranks.rank == 1:
            objective.loss = lambda *given: ((found := loss(*given))[0] * float("nan"), found[1])
        forwarded = engine.forward_backward({slot: step_for(objective, 0)})
        return engine.optim_step(slot, 1e-2).skipped, forwarded[slot].loss

    for skipped, loss in on_ranks(2, steps):
        assert skipped
        assert np.isnan(loss)


def test_units_are_assigned_evenly_whole_and_repeatably() -> None:
    generator = random.Random(0)
    for _ in range(20):
        objective: Any = generator.choice([sft.SFTConfig(), dpo.DPOConfig()]).build()
        work = {slot: step_for(objective, generator.randrange(1000)) for slot in range(generator.randint(1, 4))}
        lanes = generator.choice([2, 4, 8])
        lane_of = assign_units(work, lanes)
        assert lane_of == assign_units(work, lanes)
        assert {slot: len(own) for slot, own in lane_of.items()} == {s: len(units(own)) for s, own in work.items()}
        tokens = [0] * lanes
        for slot, own in lane_of.items():
            for unit, lane in zip(units(work[slot]), own):
                tokens[lane] += sum(map(len, unit))
        longest = max(sum(map(len, unit)) for own in work.values() for unit in units(own))
        assert max(tokens) - min(tokens) <= longest


def test_sums_are_by_halves() -> None:
    terms = [torch.tensor([number]) for number in (1e8, 1.0, -1e8, 1.0)]
    one_by_one = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    halves = (terms[0] + terms[1]) + (terms[2] + terms[3])
    assert halves != one_by_one, "or the order would not matter"
    assert by_halves([term.clone() for term in terms]) == halves
