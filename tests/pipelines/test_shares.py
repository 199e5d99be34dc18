"""Jobs over devices and machines: assigned by their work, trained by independent processes, merged."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.checkpoints.run_folder import SHARES
from lowrank.checkpoints.shared_folder import load_or_create_assignment, read_assignment
from lowrank.config import RunConfig, load
from lowrank.config.share import Share, read_share
from lowrank.data.sources.memory import keep_rows
from lowrank.errors import ConfigError, OutputError
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.pipelines.assign_jobs import job_costs
from lowrank.pipelines.job_data import prepare_all
from lowrank.pipelines.launch import train
from lowrank.pipelines.merge_shares import merge_shares
from lowrank.pipelines.processes import Child
from lowrank.pipelines.shares import SharesFailed, _MergedReporter, device_environment, refuse_rows_in_memory
from lowrank.pipelines.train import train as train_here
from lowrank.report.event_lines import as_event, as_line, decode, encode
from lowrank.report.events import CheckpointSaved, Event, Notice, RunFinished, RunStarted, StepDone
from lowrank.train.listeners import Listeners
from lowrank.train.load_balancing import balance
from tests.pipelines.forked import forked_processes
from tests.pipelines.live_runs import make_world, weights
from tests.report.event_stream import run_events


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Four candidates of a sweep, with dropout, of which two and two are compared."""
    return {
        "model": {"path": str(world / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(world / "train.json")], "eval": [str(world / "eval.json")], "batch_size": 4},
        "adapter": {"rank": 4, "dropout": 0.1},
        "output_dir": str(out),
        "save_steps": 3,
        "eval_steps": 10,
        "max_steps": 40,
        "sweep": {"grid": {"adapter.rank": [4, 8], "optimizer.learning_rate": [1e-2, 1e-3]}, "search": "none"},
        **changes,
    }


class Acts:
    """A reporter that does something once when all of some jobs have taken 10 steps."""

    def __init__(self, act: Any, jobs: set[str]) -> None:
        self.act, self.jobs, self.events = act, set(jobs), []

    def report(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone) and event.step >= 10 and event.job in self.jobs:
            self.jobs.remove(event.job)
            if not self.jobs:
                self.act()

    def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_share_is_killed_and_started_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    second = out / SHARES / "2-of-2"

    def kill() -> None:
        os.kill(json.loads((second / ".lowrank.json").read_text())["pid"], signal.SIGKILL)

    given = settings(world, out, devices=2, logging_steps=1)
    config = RunConfig(**given)
    theirs = {job.name for job in config.jobs[1::2]}
    killing = Acts(kill, theirs)
    killed = r"share 2/2: it was killed \(SIGKILL\)\nThe other shares are complete"
    with pytest.raises(SharesFailed, match=killed), forked_processes():
        train(config, reporters=[killing])
    assert read_assignment(out) == (2, {job.name: 1 + (job.name in theirs) for job in config.jobs})
    half = json.loads((out / "summary.json").read_text())
    assert {*half["jobs"]} == {job.name for job in config.jobs} - theirs
    assert half["interrupted"]

    received = Acts(lambda: None, set())
    with forked_processes():
        summary = train(RunConfig(**given, resume=True), reporters=[received])
    assert not summary["interrupted"]
    assert list(summary["jobs"]) == [job.name for job in config.jobs]
    assert {job["finished"] for job in summary["jobs"].values()} == {"done"}
    assert isinstance(received.events[-1], RunFinished)
    (started,) = [event for event in received.events if isinstance(event, RunStarted)]
    assert {job.name for job in started.jobs} == theirs, "the share that was whole did not start again"
    assert {job.first_step for job in started.jobs} < {*range(3, 40)}

    # each share is an ordinary run: its settings alone give the same bits, though it was killed on the way
    alone = load(out / SHARES / "2-of-2.json", [f"output_dir={tmp_path / 'alone'}"])
    train_here(alone)
    whole, share = weights(out), weights(tmp_path / "alone")
    assert len(share) == len(whole) / 2
    assert all(torch.equal(whole[name], share[name]) for name in share)

    # and the whole is one run for everything that reads a run
    table = json.loads((out / "sweep.json").read_text())
    assert {row["name"] for row in table["candidates"]} == {job.name for job in config.jobs}
    assert table["best"] == summary["best_job"]
    assert all(row["difference_interval"] for row in table["candidates"] if row["name"] != table["best"])
    best = (out / "best" / "adapter_model.safetensors").read_bytes()
    assert best == (out / table["best"] / "best" / "adapter_model.safetensors").read_bytes()
    again = merge_shares(out, lambda text: pytest.fail(text))
    assert again == summary
    with pytest.raises(OutputError, match="was trained in shares"):
        train(RunConfig(**settings(world, out, resume=True)))
    with pytest.raises(OutputError, match="was begun in 2 shares, now there are 4"):
        train(RunConfig(**settings(world, out, resume=True, devices=4)))


@pytest.mark.slow
def test_sigterm_saves_all_shares(world: Path, tmp_path: Path) -> None:
    """About 40 s."""
    given = settings(world, tmp_path / "run", devices=2, logging_steps=1, max_steps=2000, save_steps=None)
    config = RunConfig(**given)
    stopping = Acts(lambda: os.kill(os.getpid(), signal.SIGTERM), {job.name for job in config.jobs})
    summary = train(config, reporters=[stopping])
    assert summary["interrupted"]
    steps = [job["steps"] for job in summary["jobs"].values()]
    assert all(0 < step < 2000 for step in steps)
    assert all(list((tmp_path / "run" / SHARES / f"{n}-of-2" / "checkpoints").glob("step-*")) for n in (1, 2))


@pytest.mark.slow
def test_machines_that_each_say_their_share(world: Path, tmp_path: Path) -> None:
    """Two machines: each starts its own share and nobody else's; about 20 s."""
    given = settings(world, tmp_path / "run")
    first = train(RunConfig(**given, share="1/2"))
    merged = merge_shares(tmp_path / "run", lambda text: None)
    assert merged is not None
    assert merged["interrupted"]
    second = train(RunConfig(**given, share="2/2", resume=True))
    merged = merge_shares(tmp_path / "run", pytest.fail)
    assert merged is not None
    assert not merged["interrupted"]
    assert {*merged["jobs"]} == {*first["jobs"], *second["jobs"]}
    assert not {*first["jobs"]} & {*second["jobs"]}


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16", "SLURM_ARRAY_TASK_MIN": "1"}, Share(3, 16)),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}, Share(1, 4)),
        ({"RANK": "2", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(3, 8)),
        ({"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, Share(2, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, Share(1, 1)),
    ],
)
def test_the_share_that_the_environment_says(environment: dict[str, str], share: Share) -> None:
    assert read_share("auto", environment) == share


def test_shares_that_are_none() -> None:
    with pytest.raises(ConfigError, match="the environment does not say"):
        read_share("auto", {"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="--array=1-16"):
        read_share("auto", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "1"})
    with pytest.raises(ConfigError, match="there are only 16"):
        read_share("17/16", {})
    for text in ("0/4", "4", "4/0", "1.5/2", "a/b"):
        with pytest.raises(ValueError, match="share"):
            RunConfig(model={"path": "lowrank/tiny"}, output_dir="x", share=text)


def test_jobs_are_assigned_evenly_and_repeatably() -> None:
    generator = random.Random(0)
    for _ in range(50):
        costs = [generator.uniform(1, 100) for _ in range(generator.randint(1, 40))]
        of = generator.randint(1, 8)
        shares = balance(costs, of)
        assert shares == balance(costs, of)
        loads = [sum(cost for cost, share in zip(costs, shares) if share == n) for n in range(of)]
        assert max(loads) <= 4 / 3 * max(sum(costs) / of, max(costs)) + 1e-9
        assert {*shares} == {*range(min(of, len(costs)))}


def test_work_is_tokens_and_rank(world: Path) -> None:
    jobs = [{"name": "short", "max_steps": 3}, {"name": "long", "max_steps": 30}, {"name": "wide", "max_steps": 30,
            "adapter": {"rank": 32}}]  # fmt: skip
    given = settings(world, world / "none", jobs=jobs)
    del given["sweep"]
    config = RunConfig(**given)
    data = prepare_all(config.jobs, config.model, load_tokenizer(config.model), lambda event: None, strict=False)
    short, long, wide = job_costs(config, data)
    assert long == pytest.approx(10 * short)
    assert wide == pytest.approx(long * (1 + 3 * 32 / 32) / (1 + 3 * 4 / 32))


def test_the_first_assignment_is_kept(tmp_path: Path) -> None:
    assert load_or_create_assignment(tmp_path, ["a", "b"], 2, lambda: {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert load_or_create_assignment(tmp_path, ["b", "a"], 2, lambda: pytest.fail("assigned twice")) == {"a": 1, "b": 2}
    with pytest.raises(OutputError, match="begun in 2 shares, now there are 3"):
        load_or_create_assignment(tmp_path, ["a", "b"], 3, dict)
    with pytest.raises(OutputError, match="not those that were assigned to its shares: b, c"):
        load_or_create_assignment(tmp_path, ["a", "c"], 2, dict)
    (tmp_path / SHARES / "assignment.json").write_text('{"of": 2, "jobs": {"a": 3}}')
    with pytest.raises(OutputError, match="does not say which share"):
        read_assignment(tmp_path)


def test_the_assignment_of_an_earlier_lowrank_is_read(tmp_path: Path) -> None:
    (tmp_path / SHARES).mkdir()
    (tmp_path / SHARES / "deal.json").write_text('{"of": 2, "jobs": {"a": 2, "b": 1}}')
    assert read_assignment(tmp_path) == (2, {"a": 2, "b": 1})
    assert load_or_create_assignment(tmp_path, ["a", "b"], 2, lambda: pytest.fail("assigned twice")) == {"a": 2, "b": 1}
    assert not (tmp_path / SHARES / "assignment.json").exists()


def test_refused_together() -> None:
    with pytest.raises(ValueError, match="each device of each machine a share of its own"):
        RunConfig(model={"path": "lowrank/tiny"}, output_dir="x", share="1/2", devices=2)
    sweep = {"random": {"seed": {"integer": [1, 9]}}, "max_trials": 4, "sampler": "optuna"}
    with pytest.raises(ValueError, match="draws one candidate after another"):
        RunConfig(model={"path": "lowrank/tiny"}, output_dir="x", share="1/2", sweep={**sweep, "search": "none"})


def test_visible_devices_are_assigned(monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path) -> None:
    gpu = RunConfig(model={"path": "lowrank/tiny"}, data="lowrank/demo", output_dir="x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-8a,7")
    assert [device_environment(gpu, place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "GPU-8a", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert device_environment(gpu, 1, 2) == {"CUDA_VISIBLE_DEVICES": "1", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu = RunConfig(**settings(world, tmp_path))
    assert device_environment(cpu, 1, 2) == {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
        "LOCAL_WORLD_SIZE": "2",
    }


def test_events_survive_their_lines() -> None:
    """All but the settings of a run, the summary, and whether a step is logged."""
    for event in run_events({"a": 8, "b": 12}, not_finite=(("a", 3),)):
        back = as_event(decode(encode(as_line(event, step=1, time=0.0))))
        if isinstance(event, RunFinished):
            assert back is None
        elif isinstance(event, RunStarted):
            assert isinstance(back, RunStarted)
            assert (back.jobs, back.device, back.dtype) == (event.jobs, event.device, event.dtype)
        elif isinstance(event, CheckpointSaved):
            assert back == event
        else:
            assert repr(back).replace("logged=True", "") == repr(event).replace("logged=True", "").replace(
                "logged=False", ""
            )
    assert as_event({"event": "progress", "step": 3}) is None


def test_the_words_of_one_that_ended(tmp_path: Path) -> None:
    child = Child("share 1/2", (), tmp_path, tmp_path / "log", {}, code=1)
    assert child.stderr_tail() == "it ended with exit code 1"
    child.log.write_text("\n".join(map(str, range(40))))
    assert child.stderr_tail().splitlines() == [str(n) for n in range(28, 40)]
    child.error = "what it said"
    assert child.stderr_tail() == "what it said"


def test_a_job_of_a_foreign_share_writes_nowhere_else(tmp_path: Path) -> None:
    """Somebody's folder is looked at: names of its jobs are folders in it."""
    out = tmp_path / "theirs"
    load_or_create_assignment(out, ["../../outside"], 1, lambda: {"../../outside": 1})
    share = out / SHARES / "1-of-1"
    adapter = share / "../../outside" / "best"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    jobs = [{"name": "../../outside"}]
    config = {"model": "lowrank/tiny", "data": "lowrank/demo", "output_dir": str(out), "jobs": jobs}
    (share / "config.json").write_text(json.dumps(config))
    (share / "summary.json").write_text(json.dumps({"jobs": {"../../outside": {}}}))
    before = sorted(path for path in tmp_path.rglob("*") if "lowrank" not in path.name)
    with pytest.raises(ConfigError, match=r"jobs\.0\.name"):
        merge_shares(out, lambda text: None)
    assert sorted(path for path in tmp_path.rglob("*") if "lowrank" not in path.name) == before


def test_rows_that_other_processes_cannot_see_are_named_by_their_place() -> None:
    kept = [keep_rows([{"text": text}]) for text in ("one", "two")]
    first, second = ({"path": each.path} for each in kept)
    jobs = [{"name": "a", "data": {"train": ["lowrank/demo", first]}}, {"name": "b", "data": {"train": [second]}}]
    config = RunConfig(model="lowrank/tiny", output_dir="x", jobs=jobs, devices=2)
    with pytest.raises(ConfigError) as caught:
        refuse_rows_in_memory(config)
    assert [line.rpartition(": rows in")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  - a: the rows given as data.train.1",
        "  - b: the rows given as data.train",
    ]


def test_what_a_share_says_again_without_names_is_said_once(world: Path) -> None:
    received = Acts(lambda: None, set())
    config = RunConfig(model="lowrank/tiny", data="lowrank/demo", output_dir="x", jobs=[{"name": n} for n in "abc"])
    merged = _MergedReporter(config, Listeners([], [received]))
    for text in ("a, b: 3 rows left out", "3 rows left out", "c: 3 rows left out", "r: 3 rows", "3 rows"):
        merged.report(Notice(text))
    assert [event.text for event in received.events] == [
        "a, b: 3 rows left out",
        "c: 3 rows left out",
        "r: 3 rows",
        "3 rows",
    ]
