"""Settings that contradict each other, or have no effect beside others."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.config import unused, validate_settings
from lowrank.errors import ConfigError

TOP: dict[str, Any] = {"model": "lowrank/tiny", "data": {"train": "lowrank/demo"}, "output_dir": "runs/x"}
TWO = [{"name": "a"}, {"name": "b"}]
HELD_OUT = {"train": "lowrank/demo", "validation_split": 0.1}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tuning": "full", "jobs": TWO}, "tuning: job 'a' trains the base's own parameters"),
        ({"tuning": "full", "adapter": {"path": "runs/old"}}, "adapter.path: with tuning: full"),
        ({"resume": True, "overwrite": True}, "resume and overwrite"),
        ({"shard_size": 2}, "shard_size: base: replicated is not cut in parts"),
        ({"shard_size": 2, "base": "streamed"}, "shard_size: base: streamed is not cut in parts"),
        ({"eval_steps": 5}, "eval_steps: there are no held-out rows"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: there are no held-out rows"),
        (
            {"early_stopping_patience": 2, "data": HELD_OUT, "eval_steps": None},
            "early_stopping_patience: eval_steps is",
        ),
        ({"data": {"train": "lowrank/demo", "streaming": True}}, "max_steps: needed with data.streaming"),
        ({"adapter": "prompt_tuning", "neftune_noise_alpha": 5}, "neftune_noise_alpha: not with adapter.type prompt_"),
        (
            {"adapter": "prefix_tuning", "model": {"path": "lowrank/tiny", "attention": "padded"}},
            "model.attention: adapter.type prefix_tuning needs packed documents",
        ),
        (
            {"adapter": "prompt_tuning", "model": {"path": "lowrank/tiny", "shift_attn": 64}},
            "model.shift_attn: not with adapter.type prompt_tuning",
        ),
        (
            {"adapter": "adalora", "optimizer": "schedule_free", "schedule": "constant"},
            "optimizer.type: schedule_free averages its steps, which brings back what adalora's allocator sets",
        ),
        (
            {"data": {"train": "lowrank/demo", "streaming": True}, "max_steps": 3, "adapter": "eva"},
            "adapter.type: eva looks at the data before it starts",
        ),
        ({"data": {}}, "data.train: nothing to learn from"),
        ({"jobs": [{"name": "a"}, {"name": "b", "data": {"train": []}}]}, "jobs.1.data.train: nothing to learn from"),
    ],
)
def test_conflicts(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_settings({**TOP, **settings})
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 1
    assert lines[0].startswith(f"  - {problem}")


@pytest.mark.parametrize(
    "settings",
    [
        {"tuning": "full"},
        {"eval_steps": 5, "data": HELD_OUT},
        {"early_stopping_patience": 2, "data": {"train": "lowrank/demo", "eval": "lowrank/demo-heldout"}},
        {"data": {"train": "lowrank/demo", "streaming": True}, "max_steps": 3},
        {"eval_steps": 5, "jobs": [{"name": "a"}, {"name": "b", "data": HELD_OUT}]},
    ],
)
def test_no_conflicts(settings: dict[str, Any]) -> None:
    assert unused(validate_settings({**TOP, **settings})) == []


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"max_steps": 3, "num_train_epochs": 2}, "num_train_epochs has no effect, since max_steps is set"),
        ({"data": {"train": "lowrank/demo", "batch_size": 4, "batch_tokens": 99}}, "data.batch_size has no effect"),
        ({"data": {**HELD_OUT, "eval": "lowrank/demo-heldout"}}, "data.validation_split has no effect"),
        ({"data": {"train": [{"path": "lowrank/demo", "weight": 2}]}}, "data: weights of datasets have no effect"),
        ({"freeze": {"trainable_layers": 1}}, "freeze has no effect without tuning: freeze"),
        ({"schedule": {"num_cycles": 3}}, "schedule.num_cycles has no effect with type: cosine"),
        ({"schedule": {"type": "constant", "min_ratio": 0.1}}, "schedule.min_ratio has no effect with type: constant"),
        ({"max_steps": 3, "schedule": {"warmup_steps": 3}}, "schedule.warmup_steps: a warmup of 3 outlasts"),
        ({"tuning": "full", "adapter": {"rank": 3, "alpha": 1}}, "adapter.rank, adapter.alpha has no effect"),
        ({"adapter": {"path": "runs/old", "rank": 3}}, "adapter.rank has no effect: the adapter in adapter.path"),
        ({"adapter": {"type": "p_tuning", "dropout": 0.1}}, "adapter.dropout has no effect with type: p_tuning"),
        ({"save_steps": None, "save_total_limit": 3}, "save_total_limit has no effect without save_steps"),
    ],
)
def test_settings_without_effect_speak(settings: dict[str, Any], warning: str) -> None:
    (found,) = unused(validate_settings({**TOP, **settings}))
    assert found.startswith(warning)


def test_a_resolved_configuration_does_not_complain_about_defaults_it_spells_out() -> None:
    config = validate_settings({**TOP, "jobs": TWO, "max_steps": 3})
    assert unused(validate_settings(config.model_dump(mode="json"))) == []
