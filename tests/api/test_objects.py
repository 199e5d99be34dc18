"""Objects given to a run again: which name of its settings means which."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest

import lowrank
from lowrank.api.objects import given_again, refuse_missing
from lowrank.third_party import objects_given
from tests.api.quick_run import ROWS
from tests.api.test_own_code import Focal, Plain


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_each_is_known_by_its_name_and_rows_by_their_content() -> None:
    kept = lowrank.rows(ROWS)
    settings = {
        "jobs": [
            {
                "objective": {"type": "__main__:Plain"},  # of a script, which is a module now
                "data": {"train": [{"path": kept.path, "format": "messages"}], "default_system": "Note:short"},
            },
            {"objective": {"type": "grpo", "reward_funcs": ["tests.api.test_objects:reward"]}},
            {"objective": {"type": "tests.api.test_own_code:Focal", "gamma": 3.0}},
        ]
    }
    with pytest.raises(lowrank.ConfigError) as caught:
        refuse_missing(settings, "runs/own")
    first, *places = str(caught.value).splitlines()
    assert "resume(objects=[...])" in first
    assert places == [
        "  - jobs.0.objective.type: '__main__:Plain'",
        "  - jobs.1.objective.reward_funcs.0: 'tests.api.test_objects:reward'",
        "  - jobs.2.objective.type: 'tests.api.test_own_code:Focal'",
    ]
    own = Plain(2.0)
    found = given_again([ROWS, own, reward, Focal], settings)
    assert [source.path for source in found.rows] == [kept.path]
    assert found.objects["__main__:Plain"].Config().build() is own
    assert found.objects["tests.api.test_objects:reward"] is reward
    assert found.objects["tests.api.test_own_code:Focal"] is Focal
    with objects_given(found.objects):
        refuse_missing(settings, "runs/own")


def test_what_is_missing_stands_there_once_with_all_its_places() -> None:
    """Settings as config.json has them: what the top says stands in each job, too."""
    objective = {"type": "grpo", "reward_funcs": ["own:main_anonymous", "own:main_anonymous_2", "own:short"]}
    job = {"objective": objective, "data": {"train": [{"path": "memory:1", "format": "own:turned"}]}}
    top = {**job, "report_to": ["own:Report"], "output_dir": "x"}
    of_lambda = "a lambda; several are told apart by their order in objects=[...]"
    with pytest.raises(lowrank.ConfigError) as caught:
        refuse_missing({**top, "jobs": [job]}, "runs/own")
    assert caught.value.problems == (
        "report_to.0: 'own:Report'",
        f"objective.reward_funcs.0: 'own:main_anonymous', {of_lambda}",
        f"objective.reward_funcs.1: 'own:main_anonymous_2', {of_lambda}",
        "objective.reward_funcs.2: 'own:short'",
        "data.train.0.format: 'own:turned'",
    )
    with pytest.raises(lowrank.ConfigError) as caught:
        refuse_missing({**top, "jobs": [{**job, "name": "a"}, {"name": "b", "data": job["data"]}]}, "runs/own")
    assert caught.value.problems[-1] == "jobs.0.data.train.0.format, jobs.1.data.train.0.format: 'own:turned'"


def test_what_the_run_does_not_know_is_refused_all_at_once() -> None:
    settings = {"jobs": [{"objective": {"type": "own:Focus"}}]}
    with pytest.raises(lowrank.ConfigError) as caught:
        given_again([reward, ROWS[:2], Focal.Config()], settings)
    assert [line.partition("given")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  - tests.api.test_objects:reward is none of the objects that the run was ",
        "  - these rows are not those that the run was ",
        "  - tests.api.test_own_code:Focal is none of the objects that the run was ",
    ]


def test_a_function_that_returns_rows_is_rows() -> None:
    """As for `train`; unless the settings name it, which is known before it is called."""

    def made() -> Any:
        yield from ROWS

    def always(**columns: Any) -> list[float]:
        raise AssertionError("a reward function is called with answers alone")

    kept = lowrank.rows(made)
    assert kept.path == lowrank.rows(ROWS).path
    data = {"train": [{"path": kept.path, "format": "tests.api.test_objects:format_of_none"}]}
    settings = {"jobs": [{"data": data}]}
    found = given_again([made, functools.partial(copy.copy, ROWS), format_of_none], settings)
    assert [source.path for source in found.rows] == [kept.path] * 2
    assert list(found.objects) == ["tests.api.test_objects:format_of_none"]
    with pytest.raises(lowrank.ConfigError, match="always is none of the objects"):
        given_again([always], settings)
    with pytest.raises(lowrank.ConfigError, match="print is none of the objects"):
        given_again([print], settings)
    with pytest.raises(lowrank.ConfigError, match="these rows are not those"):
        given_again([lambda: ROWS[:2]], settings)


def format_of_none() -> None:
    """Never called."""
    raise AssertionError


def test_objects_of_a_first_run_stand_in_its_settings() -> None:
    with pytest.raises(lowrank.ConfigError, match=r"objective=Focal\(\).*TrainedRun\(RUN\)\.resume\(objects"):
        lowrank.train(model="lowrank/tiny", data=ROWS, output_dir="never", objects=[Focal()])
