"""Jobs over the top level."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from lowrank.adapters.variants.rslora import RsLoraConfig
from lowrank.config import JobConfig, RunConfig, validate_settings
from lowrank.data.config import DataConfig
from lowrank.errors import ConfigError
from lowrank.objectives import Objective
from lowrank.objectives.sft import SFTConfig
from lowrank.settings import Settings

TOP: dict[str, Any] = {"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": "runs/x"}


def jobs(*entries: Any, **top: Any) -> tuple[JobConfig, ...]:
    return validate_settings({**TOP, **top, "jobs": list(entries)}).jobs


def test_an_entry_overrides_setting_by_setting() -> None:
    a, b = jobs(
        {"name": "a", "adapter": {"alpha": 3}, "seed": 7},
        {"name": "b", "data": {"batch_size": 2}, "optimizer": {"type": "sgd"}},
        adapter={"rank": 4},
        optimizer={"learning_rate": 1e-3},
    )
    assert (a.adapter.rank, a.adapter.alpha, a.seed) == (4, 3, 7)
    assert (b.adapter.rank, b.adapter.alpha, b.seed) == (4, None, 42)
    assert (b.data.batch_size, b.data.train) == (2, a.data.train)
    assert (b.optimizer.type, b.optimizer.learning_rate) == ("sgd", 1e-3)


def test_another_type_of_adapter_keeps_what_all_types_share() -> None:
    a, b = jobs({"name": "a"}, {"name": "b", "adapter": "rslora"}, adapter={"rank": 4, "dropout": 0.1})
    assert (a.adapter.type, a.adapter.rank, a.adapter.dropout) == ("lora", 4, 0.1)
    assert (b.adapter.type, b.adapter.rank, b.adapter.dropout) == ("rslora", 4, 0.1)


def test_another_objective_starts_afresh() -> None:
    a, b = jobs({"name": "a"}, {"name": "b", "objective": "pretrain"}, objective={"type": "sft"})
    assert (a.objective.type, b.objective.type) == ("sft", "pretrain")


def test_null_in_an_entry_overrides_too() -> None:
    a, b = jobs({"name": "a"}, {"name": "b", "max_steps": None}, max_steps=5)
    assert (a.max_steps, b.max_steps) == (5, None)


def test_lists_and_free_groups_are_replaced_whole() -> None:
    (a,) = jobs(
        {"name": "a", "data": {"train": ["lowrank/demo-heldout"]}, "adapter": {"rank_pattern": {"v_proj": 2}}},
        adapter={"rank_pattern": {"q_proj": 4}},
    )
    assert [source.path for source in a.data.train] == ["lowrank/demo-heldout"]
    assert a.adapter.rank_pattern == {"v_proj": 2}


def test_the_python_face_takes_dicts_and_objects() -> None:
    data = DataConfig(train=("lowrank/demo",), batch_size=3)  # type: ignore[arg-type]
    config = RunConfig(
        model="lowrank/tiny",  # type: ignore[arg-type]
        data=data,
        adapter=RsLoraConfig(rank=2),
        output_dir="runs/x",  # type: ignore[arg-type]
        jobs=[{"name": "a"}, {"name": "b", "adapter": {"rank": 8}}],  # type: ignore[arg-type]
    )
    assert [(job.adapter.type, job.adapter.rank) for job in config.jobs] == [("rslora", 2), ("rslora", 8)]
    assert all(job.data == data for job in config.jobs)
    assert RunConfig(**dict(config)) == config


def test_complete_jobs_may_be_given_as_objects() -> None:
    (job,) = jobs({"name": "a"})
    assert RunConfig(**{**TOP, "jobs": (job,)}).jobs == (job,)


def test_an_empty_list_of_jobs_is_one_job() -> None:
    assert [job.name for job in validate_settings({**TOP, "jobs": []}).jobs] == ["default"]


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "", "a b", "x" * 101, "-a", "a\n"])
def test_names_that_are_no_folder_names(name: str) -> None:
    with pytest.raises(ConfigError, match=r"jobs\.0\.name: expected"):
        jobs({"name": name})


@pytest.mark.parametrize("name", ["r8", "lr=1e-4", "第一", "a.b-c_d"])
def test_names_that_are(name: str) -> None:
    assert jobs({"name": name})[0].name == name


def test_names_must_differ_also_on_file_systems_without_case() -> None:
    with pytest.raises(ConfigError, match=r"jobs\.1\.name: 'R8' is used more than once"):
        jobs({"name": "r8"}, {"name": "R8"})


def test_names_of_the_run_folder_are_taken() -> None:
    with pytest.raises(ConfigError, match="'checkpoints' cannot be the name"):
        jobs({"name": "checkpoints"})


class MyLoss:
    """A third party's objective, named `tests.config.test_jobs:MyLoss`."""

    class Config(Settings):
        type: Literal["tests.config.test_jobs:MyLoss"] = "tests.config.test_jobs:MyLoss"
        beta: float = 1.0
        """Of no meaning."""

        def build(self) -> Objective:
            return SFTConfig().build()


class Nameless:
    class Config(Settings):
        pass


@pytest.mark.usefixtures("allowed_code")
def test_a_third_party_s_type_goes_through_jobs_and_json() -> None:
    name = "tests.config.test_jobs:MyLoss"
    config = validate_settings(
        {**TOP, "objective": {"type": name, "beta": 2}, "jobs": [{"name": "a"}, {"name": "b", "objective": "sft"}]}
    )
    a, b = config.jobs
    assert (a.objective, b.objective.type) == (MyLoss.Config(beta=2), "sft")
    assert validate_settings(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match=r"objective\.bta: unknown key"):
        validate_settings({**TOP, "objective": {"type": name, "bta": 2}})
    with pytest.raises(ConfigError, match=r"Nameless\.Config needs the field `type"):
        validate_settings({**TOP, "objective": "tests.config.test_jobs:Nameless"})
    with pytest.raises(ConfigError, match="objective: cannot import 'nowhere:X'"):
        validate_settings({**TOP, "objective": "nowhere:X"})
