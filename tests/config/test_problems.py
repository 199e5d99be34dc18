"""Mistakes, told in plain words with their place."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.config import validate_settings
from lowrank.errors import ConfigError
from lowrank.settings import configs_in

TOP: dict[str, Any] = {"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": "runs/x"}


def problems(settings: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate_settings(settings)
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"adapter": {"rnk": 8}}, "adapter.rnk: unknown key; did you mean 'rank'?"),
        ({"learning_rate": 1}, "learning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
        ({"optimizer": {"rank": 1}}, "optimizer.rank: unknown key; did you mean 'adapter.rank'?"),
        ({"adapter": "rslra"}, "adapter: there is no type 'rslra'; did you mean 'rslora'?"),
        (
            {"adapter": {"type": 3}},
            f"adapter: there is no type 3; known: {', '.join(configs_in('lowrank.adapters.variants'))}",
        ),
        (
            {"adapter": "bottleneck"},
            "adapter: there is no type 'bottleneck' here: say which: houlsby, pfeiffer or parallel",
        ),
        ({"adapter": 5}, "adapter: expected a group of settings (key: value), got 5"),
        ({"adapter": {"rank": 0}}, "adapter.rank: expected a number above 0, got 0"),
        ({"adapter": {"rank": 1.5}}, "adapter.rank: expected a whole number, got 1.5"),
        ({"adapter": {"dropout": 1}}, "adapter.dropout: expected a number below 1, got 1"),
        ({"adapter": {"type": "rslora", "dropout": -1}}, "adapter.dropout: expected a number at least 0, got -1"),
        (
            {"data": {"train": "x.json", "mix": "concatt"}},
            "data.mix: expected 'concat', 'interleave', 'interleave_over' or 'interleave_once', got 'concatt'; "
            "did you mean 'concat'?",
        ),
        (
            {"data": {"train": [{"path": "a", "colums": {}}]}},
            "data.train.0.colums: unknown key; did you mean 'columns'?",
        ),
        ({"data": {"train": [{"format": "alpaca"}]}}, "data.train.0.path: required, but not given"),
        ({"data": {"train": [3]}}, "data.train.0: expected a group of settings (key: value), got 3"),
        ({"resume": "maybe"}, "resume: expected true or false, got 'maybe'"),
        ({"save_steps": 1.5}, "save_steps: expected a whole number or a number below 1, got 1.5"),
        ({"save_steps": "often"}, "save_steps: expected a number, got 'often'"),
        (
            {"model": {"path": "m", "activation_checkpointing": "some"}},
            "model.activation_checkpointing: expected 'auto', 'none', 'selective', 'full', 'sqrt' or 'offload' or a "
            "whole number, "
            "got 'some'",
        ),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1: required, but not given"),
        (
            {"schedule": {"warmup_steps": 3, "warmup_ratio": 0.1}},
            "schedule: give warmup_steps or warmup_ratio, not both",
        ),
        ({"jobs": "all"}, "jobs: expected a list, got 'all'"),
        ({"jobs": [{"seed": 1}]}, "jobs.0.name: required, but not given; every entry of jobs needs one"),
        (
            {"jobs": [{"name": "a", "output_dir": "x"}]},
            "jobs.0.output_dir: unknown key; it belongs to the whole run: put it at the top level",
        ),
        (
            {"jobs": [{"name": "a"}, {"name": "b", "adapter": {"rnk": 8}}]},
            "jobs.1.adapter.rnk: unknown key; did you mean 'rank'?",
        ),
        (
            {"adapter": {"rnk": 8}, "jobs": [{"name": "a"}, {"name": "b", "adapter": {"rank": 1}}]},
            "adapter.rnk: unknown key; did you mean 'rank'?",
        ),
    ],
)
def test_one_mistake_is_one_line(settings: dict[str, Any], problem: str) -> None:
    assert problems({**TOP, **settings}) == [problem]


def test_what_is_required() -> None:
    assert problems({"data": "lowrank/demo"}) == [
        "model: required, but not given (The base; only its path stands for `{path: ...}`)",
        "output_dir: required, but not given (The run folder: `summary.json`, `metrics.jsonl`, `loss.png` and one "
        "folder per job)",
    ]


def test_all_mistakes_at_once() -> None:
    found = problems(
        {
            "modle": "m",
            "data": {"train": "x", "batchsize": 1},
            "jobs": [{"name": "a", "tuning": "ful"}, {"name": "a b"}, 3],
        }
    )
    places = [problem.split(":")[0] for problem in found]
    assert sorted(places) == [
        "data.batchsize",
        "jobs.0.tuning",
        "jobs.1.name",
        "jobs.2",
        "model",
        "modle",
        "output_dir",
    ]
