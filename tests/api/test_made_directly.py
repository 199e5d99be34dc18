"""Settings and front-door objects made in Python by hand: every mistake at once, in the words that files get."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

import lowrank
from lowrank.errors import ConfigError
from lowrank.renamed import RENAMED_OPTIONS
from lowrank.settings import Settings
from lowrank.train.optimizers.adamw import AdamWConfig

front: Any = lowrank
"""As a person without a type checker has it."""


def problems(make: Any, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert list(caught.value.problems) == [line.removeprefix("  - ") for line in str(caught.value).splitlines()[1:]]
    return list(caught.value.problems)


def test_a_run_lists_every_problem_at_once() -> None:
    found = problems(
        front.RunConfig,
        model={"path": "lowrank/tiny", "recompute": "none"},
        data="lowrank/demo",
        learning_rate=1e-4,
        adapter={"rank": 0},
        jobs=[{"name": "a", "tuning": "ful"}],
    )
    assert sorted(found) == [
        "adapter.rank: expected a number above 0, got 0",
        "jobs.0.tuning: expected 'adapter', 'full' or 'freeze', got 'ful'; did you mean 'full'?",
        "learning_rate: unknown key; did you mean 'optimizer.learning_rate'?",
        "model.recompute: unknown key; it is called 'model.activation_checkpointing' now",
        "output_dir: required, but not given (The run folder: `summary.json`, `metrics.jsonl`, `loss.png` and one "
        "folder per job)",
    ]


def test_a_run_says_what_contradicts() -> None:
    job = front.JobConfig(name="a", data="lowrank/demo", tuning="full")
    found = problems(front.RunConfig, model="lowrank/tiny", output_dir="x", jobs=[job, {"name": "b"}])
    assert any("tuning" in line for line in found)


def test_a_job_takes_short_forms_and_lists_every_problem() -> None:
    job = front.JobConfig(name="a", data="lowrank/demo", adapter="rslora", optimizer={"learning_rate": 1e-4})
    assert (job.data.train[0].path, job.adapter.type) == ("lowrank/demo", "rslora")
    assert problems(front.JobConfig, adapter={"rnk": 8}, rank=4, seed=-1) == [
        "adapter.rnk: unknown key; did you mean 'rank'?",
        "seed: expected a number at least 0, got -1",
        "name: required, but not given (What the job is called; also its folder in `output_dir`)",
        "rank: unknown key; did you mean 'adapter.rank' or 'optimizer.rank'?",
    ]


def test_every_other_group_too() -> None:
    assert problems(front.GenerationConfig, temprature=1, top_p="much") == [
        "top_p: expected a number, got 'much'",
        "temprature: unknown key; did you mean 'temperature'?",
    ]
    assert problems(AdamWConfig, betas=[0.9]) == ["betas.1: required, but not given"]


def test_settings_are_given_by_name() -> None:
    with pytest.raises(ConfigError, match=r"given by name, RunConfig\(data=\.\.\.\)"):
        front.RunConfig({"model": "lowrank/tiny"})


def test_a_group_within_a_group_is_read_without_a_call() -> None:
    """So that pydantic collects its problems with the others."""

    class Inner(Settings):
        """Inside."""

        size: int = 1
        """How large."""

    class Outer(Settings):
        """Around."""

        inner: Inner = Inner()
        """One."""
        name: str
        """The other."""

    assert problems(Outer, inner={"size": "big"}) == [
        "inner.size: expected a whole number, got 'big'",
        "name: required, but not given",
    ]


def test_old_keywords_of_serve_name_the_new_ones() -> None:
    old = RENAMED_OPTIONS["serve"]
    assert problems(front.serve, path="lowrank/tiny", **dict.fromkeys(old, 8), tokn="x") == [
        *(f"{name}: it is called {new!r} now" for name, new in old.items()),
        "tokn: unknown keyword; did you mean 'token'?",
    ]
    assert set(old.values()) <= set(inspect.signature(front.serve).parameters)


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda: front.load("lowrank/tiny", adapter=["x"]), "adapter: unknown keyword; did you mean 'adapters'?"),
        (lambda: front.evaluate("lowrank/tiny", [], metric=[]), "metric: unknown keyword; did you mean 'metrics'?"),
        (lambda: front.LiveRun("x", time_out=3), "time_out: unknown keyword; did you mean 'timeout'?"),
    ],
)
def test_unknown_keywords_of_the_front_door(call: Any, problem: str) -> None:
    assert problems(call) == [problem]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = front.RunConfig(model="lowrank/tiny", data="lowrank/demo", output_dir=folder)
    (folder / "config.json").write_text(config.model_dump_json(exclude_unset=True), encoding="utf-8")
    return folder


def test_a_live_runs_times_are_numbers(run: Path) -> None:
    assert problems(front.LiveRun, path=run, timeout="soon", wait=-1) == [
        "timeout: expected a number of seconds, got 'soon'",
        "wait: expected a number of seconds, got -1",
    ]


def test_a_job_added_to_a_live_run_has_all_its_problems_in_one_error(run: Path) -> None:
    live = front.LiveRun(run)
    wrong = {"name": "default", "adapter": {"rank": 0}, "adaptor": {}, "model": {"recompute": "none"}}
    assert problems(live.add, job=wrong) == [
        "name: 'default' is a job of this run already; choose another",
        "adapter.rank: expected a number above 0, got 0",
        "adaptor: unknown key; did you mean 'adapter'?",
        "model: unknown key; it belongs to the whole run: put it at the top level",
    ]


def test_a_priority_is_a_whole_number(run: Path) -> None:
    with pytest.raises(ConfigError, match="priority: expected a whole number, got 'high'"):
        front.LiveRun(run).priority("default", "high")
