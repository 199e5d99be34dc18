"""Candidates of a sweep: which there are, what they are called, and what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from lowrank.config import RunConfig, validate_settings
from lowrank.errors import ConfigError
from lowrank.search.candidates import draw, first_candidates, num_combinations, too_many
from lowrank.search.config import Draw, SweepConfig


def sweep(**settings: Any) -> SweepConfig:
    return SweepConfig(**settings)


def values(**settings: Any) -> list[dict[str, Any]]:
    return [dict(candidate.values) for candidate in first_candidates(sweep(**settings))]


def test_a_grid_is_every_combination_in_the_order_of_the_file() -> None:
    found = values(grid={"adapter.rank": [8, 16], "optimizer.learning_rate": [1e-4, 1e-3, 1e-2]})
    expected = itertools.product([8, 16], [1e-4, 1e-3, 1e-2])
    assert [tuple(each.values()) for each in found] == list(expected)


def test_candidates_times_grid() -> None:
    found = values(candidates=[{"adapter.type": "dora"}, {"adapter.type": "lora"}], grid={"seed": [1, 2]})
    assert [(each["adapter.type"], each["seed"]) for each in found] == [
        ("dora", 1),
        ("dora", 2),
        ("lora", 1),
        ("lora", 2),
    ]


def test_what_is_drawn_is_the_same_again_and_spread_as_asked() -> None:
    given = {
        "random": {"optimizer.learning_rate": {"log_uniform": [1e-5, 1e-1]}, "adapter.rank": {"choice": [4, 8]},
                   "seed": {"integer": [3, 5]}, "adapter.dropout": {"uniform": [0.0, 0.5]}},
        "max_trials": 400,
    }  # fmt: skip
    found = values(**given)
    assert found == values(**given) != values(**given, seed=1)
    rates = np.array([each["optimizer.learning_rate"] for each in found])
    assert 1e-5 <= rates.min() < 3e-5
    assert np.median(np.log10(rates)) == pytest.approx(-3, abs=0.4), "as often below as above the middle power of ten"
    assert Counter(each["adapter.rank"] for each in found)[4] == pytest.approx(200, abs=50)
    assert {each["seed"] for each in found} == {3, 4, 5}
    assert all(isinstance(each["seed"], int) for each in found)
    assert np.mean([each["adapter.dropout"] for each in found]) == pytest.approx(0.25, abs=0.04)


def test_of_a_billion_combinations_some_are_drawn() -> None:
    grid = {f"data.{name}": list(range(1000)) for name in ("a", "b", "c")}
    found = sweep(grid=grid, max_trials=20)
    assert num_combinations(found) == 10**9
    drawn = [tuple(each.values.values()) for each in first_candidates(found)]
    assert len(set(drawn)) == 20
    assert too_many(sweep(grid=grid))
    assert not too_many(found)


def test_names_tell_what_they_are_and_are_names_of_folders() -> None:
    given = {"adapter.rank": [8], "optimizer.learning_rate": [3e-4], "adapter.target_modules": [["q_proj", "v/proj"]]}
    (only,) = first_candidates(sweep(grid=given))
    assert only.name == "0-rank=8-learning_rate=0.0003"
    assert only.as_entry() == {
        "name": only.name,
        "adapter": {"rank": 8, "target_modules": ["q_proj", "v/proj"]},
        "optimizer": {"learning_rate": 3e-4},
    }
    many = first_candidates(sweep(grid={"data.system": [f"line {n}/ü" for n in range(12)]}))
    assert many[3].name == "03-system=line_3_ü"
    RunConfig(model="m", data="d.json", output_dir="o", jobs=[{"name": each.name} for each in many])  # type: ignore[arg-type]


def test_integers_include_both_ends() -> None:
    assert {draw(Draw(integer=(1, 3)), np.random.default_rng(n)) for n in range(40)} == {1, 2, 3}


TOP = {"model": "lowrank/tiny", "data": {"train": ["lowrank/demo-train"], "validation_split": 0.1}, "output_dir": "o"}


def test_a_sweep_makes_the_jobs_and_reads_back() -> None:
    config = validate_settings(
        {**TOP, "adapter": {"rank": 4}, "sweep": {"grid": {"optimizer.learning_rate": [1e-4, 1e-3]}}}
    )
    assert [job.name for job in config.jobs] == ["0-learning_rate=0.0001", "1-learning_rate=0.001"]
    assert [job.optimizer.learning_rate for job in config.jobs] == [1e-4, 1e-3]
    assert {job.adapter.rank for job in config.jobs} == {4}
    assert len({job.seed for job in config.jobs}) == 1
    assert validate_settings(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grid": {"adapter.rnk": [8]}}, ["sweep.grid.adapter.rnk: jobs have no such setting; did you mean 'adapter."]),
        ({"grid": {"adapter.rank": [8, 0]}}, ["sweep.grid.adapter.rank: expected a number above 0, got 0"]),
        ({"grid": {"adapter.rank": []}}, ["grid.adapter.rank: there are no values"]),
        ({}, ["there are no candidates: give grid, random or candidates"]),
        ({"random": {"adapter.rank": {"integer": [1, 4]}}}, ["say how many candidates to draw, max_trials"]),
        ({"random": {"seed": {"integer": [4, 1]}}, "max_trials": 2}, ["the first number is above the second"]),
        ({"random": {"seed": {"log_uniform": [0, 1]}}, "max_trials": 2}, ["both numbers are above 0"]),
        ({"random": {"seed": {}}, "max_trials": 2}, ["give exactly one of uniform"]),
        ({"grid": {"seed": [1]}, "metric": "rouge1"}, ["sweep.metric: rouge1: the jobs report loss; set eval_metric"]),
        ({"grid": {"seed": [1], "objective.type": ["sft", "orpo"]}}, ["losses of different objectives do not compare"]),
        ({"grid": {"seed": [1]}, "sampler": "optuna"}, ["sampler: optuna draws what is in random"]),
        ({"grid": {"seed": [1]}, "serch": "asha"}, ["sweep.serch: unknown key; did you mean 'search'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_in_the_words_of_the_file(given: dict[str, Any], message: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        validate_settings({**TOP, "sweep": given})
    for each in message:
        assert each in str(refused.value)
    assert str(refused.value).count("\n") == 1, f"one line for one mistake, not one for each candidate: {refused.value}"


def test_held_out_rows_are_needed_to_compare() -> None:
    top = {**TOP, "data": {"train": ["lowrank/demo-train"]}}
    with pytest.raises(ConfigError, match="compares candidates on held-out rows"):
        validate_settings({**top, "sweep": {"grid": {"seed": [1, 2]}}})
    validate_settings({**top, "sweep": {"grid": {"seed": [1, 2]}, "search": "none"}})


def test_jobs_beside_a_sweep_are_refused() -> None:
    with pytest.raises(ConfigError, match="its candidates are the jobs"):
        validate_settings({**TOP, "jobs": [{"name": "a"}], "sweep": {"grid": {"seed": [1, 2]}}})
