"""What may differ between a checkpoint's settings and those of the run that resumes it."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank.checkpoints.settings_changes import MAY_CHANGE, changed_settings, refuse_changed_settings
from lowrank.config.schema import RunConfig
from lowrank.errors import OutputError


def settings(**changes: Any) -> dict[str, Any]:
    start = {"model": "base", "data": {"train": ["a.json"]}, "output_dir": "runs/first"}
    return RunConfig.model_validate({**start, **changes}).model_dump(mode="json")


def test_the_same_settings() -> None:
    assert changed_settings(settings(), settings()) == []
    refuse_changed_settings(settings(), settings())


def test_what_may_change_may_change() -> None:
    other = settings(output_dir="runs/moved", num_train_epochs=5, logging_steps=1, save_steps=7, resume=True,
                     report_to=["tensorboard"], model={"path": "base", "activation_checkpointing": "full"})  # fmt: skip
    assert changed_settings(settings(), other) == []


def test_what_may_change_exists() -> None:
    """Each name is a setting, so the list cannot rot."""
    for path in MAY_CHANGE:
        value: Any = settings(max_steps=1)
        for part in path.split("."):
            assert part in value, path
            value = value[part]


def test_every_other_change_is_listed_at_once() -> None:
    other = settings(optimizer={"learning_rate": 1e-4}, seed=1, adapter={"rank": 8}, model={"path": "another"})
    assert changed_settings(settings(), other) == [
        "adapter.rank: 16 in the checkpoint, now 8",
        "optimizer.learning_rate: 0.0002 in the checkpoint, now 0.0001",
        "seed: 42 in the checkpoint, now 1",
        'model.path: "base" in the checkpoint, now "another"',
    ]
    with pytest.raises(OutputError) as caught:
        refuse_changed_settings(settings(), other)
    assert "adapter.rank: 16" in str(caught.value)
    assert "num_train_epochs" in str(caught.value)


def test_jobs_are_compared_by_name() -> None:
    old = settings(jobs=[{"name": "a"}, {"name": "b", "adapter": {"rank": 8}}])
    turned = settings(jobs=[{"name": "b", "adapter": {"rank": 8}}, {"name": "a"}])
    assert changed_settings(old, turned) == []
    other = settings(jobs=[{"name": "a", "max_steps": 9}, {"name": "b", "adapter": {"rank": 4}}])
    assert changed_settings(old, other) == ["jobs[b].adapter.rank: 8 in the checkpoint, now 4"]


def test_other_jobs_are_one_line_and_the_first() -> None:
    old = settings(jobs=[{"name": "focal"}, {"name": "grpo"}])
    assert changed_settings(old, settings(seed=1)) == [
        "jobs: the checkpoint has jobs focal, grpo; these settings have job default. A job is known by its name"
    ]
    more = settings(jobs=[{"name": "grpo", "adapter": {"rank": 4}}, {"name": "new"}], model={"path": "another"})
    assert changed_settings(old, more) == [
        "jobs: the checkpoint has jobs focal, grpo; these settings have jobs grpo, new. A job is known by its name",
        "jobs[grpo].adapter.rank: 16 in the checkpoint, now 4",
        'model.path: "base" in the checkpoint, now "another"',
    ]
    many = settings(jobs=[{"name": f"r{number}"} for number in range(30)])
    assert "r19 and 10 more; these" in changed_settings(many, old)[0]
