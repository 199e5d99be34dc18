"""Sweeps whole: real runs on a tiny base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.checkpoints.live_commands import send
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.errors import ConfigError
from lowrank.pipelines import memory_plan
from lowrank.pipelines.train import train
from lowrank.planning.choose import choose
from lowrank.planning.plan import MemoryPlan, Planner
from lowrank.report.events import JobFinished, JobMoved, JobStarted, Notice, StepDone
from tests.pipelines.live_runs import Killed, ScriptedReporter, kill, make_world, run, settings, weights

GRID = {"adapter.rank": [2, 4], "optimizer.learning_rate": [1e-3, 1e-2]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def swept(world: Path, out: Path, sweep: dict[str, Any], **changes: Any) -> dict[str, Any]:
    given = settings(world, out, max_steps=8, eval_steps=0.5, sweep=sweep, **changes)
    del given["jobs"]
    return given


def ends(received: ScriptedReporter) -> dict[str, tuple[int, str]]:
    return {event.job[:1]: (event.step, event.reason) for event in received.events if isinstance(event, JobFinished)}


def test_asha_frees_a_slot_in_the_step_in_which_a_candidate_is_pruned(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four candidates in two slots: the better of each two goes on, the next takes the other's slot at once."""
    out = tmp_path / "run"
    sweep = {"grid": GRID, "reduction_factor": 2, "first_rung": 0.25}
    summary, received = run(swept(world, out, sweep, max_concurrent_jobs=2))
    assert ends(received) == {"0": (2, "pruned"), "1": (8, "done"), "2": (2, "pruned"), "3": (8, "done")}
    running: list[set[str]] = []
    for event in received.events:
        if isinstance(event, StepDone):
            if not running or event.job[:1] in running[-1]:
                running.append(set())
            running[-1].add(event.job[:1])
    assert running[:6] == [{"0", "1"}, {"0", "1"}, {"1", "2"}, {"1", "2"}, {"1", "3"}, {"1", "3"}]
    assert all(len(each) == 2 for each in running[:8])
    table = json.loads((out / "sweep.json").read_text())
    assert table["best"] == summary["best_job"] == "3-rank=4-learning_rate=0.01"
    assert [row["place"] for row in table["candidates"]] == [1, 2, 3, 4]
    assert (table["steps"], table["steps_of_all"]) == (20, 32)
    best, own = load_adapter(out / "best").tensors, load_adapter(out / table["best"] / "best").tensors
    assert all(torch.equal(best[name], own[name]) for name in own)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Sweep" in page
    assert page.count('<path class="c0"') >= 2
    with pytest.raises(SystemExit):
        main(["show", str(out)])
    assert "3-rank=4" in capsys.readouterr().out


def test_successive_halving_parks_those_that_wait(world: Path, tmp_path: Path) -> None:
    """Two slots, four candidates: all come to the rung, one after another; the best two go on where they were."""
    out = tmp_path / "run"
    sweep = {"grid": GRID, "reduction_factor": 2, "first_rung": 0.25, "search": "successive_halving"}
    _, received = run(swept(world, out, sweep, max_concurrent_jobs=2))
    alone = run(swept(world, tmp_path / "alone", {**sweep, "search": "none"}, max_concurrent_jobs=4))[1]
    found = ends(received)
    assert sorted(found.values()) == [(2, "pruned"), (2, "pruned"), (4, "pruned"), (8, "done")]
    parked = {event.job for event in received.events if isinstance(event, JobMoved)}
    survivors = {event.job for event in received.events if isinstance(event, StepDone) and event.step > 2}
    assert parked & survivors, "one of the first two waited for the others"
    for name in survivors:
        own = received.losses(name)
        assert own == pytest.approx(alone.losses(name)[: len(own)], abs=1e-6), "put back as it was"


def test_killed_and_resumed_to_the_same_bits(world: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sweep = {"grid": GRID, "reduction_factor": 2, "first_rung": 0.25, "search": "successive_halving"}
    run(swept(world, whole, sweep, max_concurrent_jobs=2, save_steps=1))
    killer = ScriptedReporter(cut)
    killer.report = lambda event: kill() if isinstance(event, StepDone) and event.job[:1] == "3" else None  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(RunConfig(**swept(world, cut, sweep, max_concurrent_jobs=2, save_steps=1)), reporters=[killer])
    run(swept(world, cut, sweep, max_concurrent_jobs=2, save_steps=1, resume=True))
    one, other = weights(whole), weights(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    tables = [json.loads((out / "sweep.json").read_text()) for out in (whole, cut)]
    assert tables[0] == tables[1]


def test_optuna_draws_and_its_database_opens(world: Path, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    out = tmp_path / "run"
    sweep = {
        "random": {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]}, "adapter.rank": {"choice": [2, 4]}},
        "max_trials": 12, "sampler": "optuna", "reduction_factor": 2, "first_rung": 0.25,
    }  # fmt: skip
    _, received = run(swept(world, out, sweep, max_concurrent_jobs=6))
    come = [event.name[:2] for event in received.events if isinstance(event, JobStarted)]
    assert come[-2:] == ["11", "11"] or {"10", "11"} <= {*come}
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{out / 'optuna.db'}")
    assert len(study.trials) == 12
    states = [trial.state.name for trial in study.trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    table = json.loads((out / "sweep.json").read_text())
    assert min(row["loss"] for row in table["candidates"] if row["state"] == "done") == pytest.approx(study.best_value)


def test_ten_thousand_combinations_ask_how_many(world: Path, tmp_path: Path) -> None:
    grid = {"seed": list(range(100)), "optimizer.learning_rate": [n / 1e4 for n in range(1, 101)]}
    with pytest.raises(ConfigError, match=r"10,000 combinations, about .* on this machine.*sweep.max_trials"):
        run(swept(world, tmp_path / "run", {"grid": grid}))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_candidate_that_fits_no_layer_ends_alone(world: Path, tmp_path: Path) -> None:
    grid = {"adapter.target_modules": [["q_proj"], ["nothing_proj"], ["v_proj"]]}
    _, received = run(swept(world, tmp_path / "run", {"grid": grid, "search": "none"}, max_concurrent_jobs=1))
    assert ends(received) == {"0": (8, "done"), "1": (0, "failed"), "2": (8, "done")}
    assert any(isinstance(event, Notice) and "nothing_proj" in event.text for event in received.events)
    rows = json.loads((tmp_path / "run/sweep.json").read_text())["candidates"]
    assert [row["state"] for row in rows] == ["done", "done", "failed"]


def test_those_that_waited_for_a_candidate_that_cannot_begin_are_decided(world: Path, tmp_path: Path) -> None:
    grid = {"adapter.target_modules": [["q_proj"], ["v_proj"], ["nothing_proj"]]}
    sweep = {"grid": grid, "search": "successive_halving", "reduction_factor": 2, "first_rung": 0.25}
    _, received = run(swept(world, tmp_path / "run", sweep, max_concurrent_jobs=2))
    assert sorted(ends(received).values()) == [(0, "failed"), (2, "pruned"), (8, "done")]
    rows = json.loads((tmp_path / "run/sweep.json").read_text())["candidates"]
    assert [row["state"] for row in rows] == ["done", "pruned", "failed"]


@pytest.mark.parametrize("concurrent", [2, 3])
def test_stopping_the_one_that_others_wait_for_decides_about_them(world: Path, tmp_path: Path, concurrent: int) -> None:
    """It waits for its first slot itself (2), or trains at less than a rung (3)."""
    out = tmp_path / "run"
    grid = [{"max_steps": 8}, {"max_steps": 8, "seed": 1}, {"max_steps": 16}]
    sweep = {"candidates": grid, "search": "successive_halving", "reduction_factor": 2, "first_rung": 0.25}
    last = "2-max_steps=16"

    def stop() -> None:
        send(out, "stop", last)

    _, received = run(swept(world, out, sweep, max_concurrent_jobs=concurrent), **{"1_max_steps=8_seed=12": stop})
    found = ends(received)
    assert found.pop("2") == (0 if concurrent == 2 else 2, "stopped")
    assert sorted(found.values()) == [(2, "pruned"), (8, "done")]
    rows = json.loads((out / "sweep.json").read_text())["candidates"]
    assert sorted(row["state"] for row in rows) == ["done", "pruned", "stopped"]


def test_as_many_at_a_time_as_fit_and_each_number_is_planned_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside two adapters there is no room, as far as the plan knows."""
    planned: list[int] = []

    def choose_on_a_small_machine(planner: Planner, *given: Any) -> MemoryPlan:
        plan = choose(planner, *given)
        planned.append(len(planner.memory.jobs))
        return dataclasses.replace(plan, available=1) if planned[-1] > 2 else plan

    monkeypatch.setattr(memory_plan, "choose", choose_on_a_small_machine)
    summary, received = run({**swept(world, tmp_path / "run", {"grid": GRID, "search": "none"}), "max_steps": 2})
    assert planned == [4, 2]
    assert any("2 candidates fit" in event.text for event in received.events if isinstance(event, Notice))
    steps = [event.job[:1] for event in received.events if isinstance(event, StepDone)]
    assert steps == ["0", "1"] * 2 + ["2", "3"] * 2
    assert len(summary["jobs"]) == 4


def test_candidates_are_compared_by_what_they_answer(world: Path, tmp_path: Path) -> None:
    judged = {"eval_metric": "exact_match", "eval_generate_samples": 4, "eval_max_new_tokens": 4}
    sweep = {"grid": {"adapter.rank": [2, 4]}, "search": "none"}
    run({**swept(world, tmp_path / "run", sweep, **judged), "max_steps": 2})
    table = json.loads((tmp_path / "run/sweep.json").read_text())
    assert table["metric"] == "exact_match"
    for row in table["candidates"]:
        low, high = row["interval"]
        assert low <= row["score"] <= high
    assert table["candidates"][1]["difference"] == pytest.approx(
        table["candidates"][1]["score"] - table["candidates"][0]["score"]
    )
