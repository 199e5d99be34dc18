"""Live commands to a run that trains: carried out once, between two steps, and the other jobs do not notice."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank
from lowrank.checkpoints.atomic import remove
from lowrank.checkpoints.live_commands import CommandQueue, CommandReply, read_state, replies, send
from lowrank.cli.main import main
from lowrank.config import RunConfig
from lowrank.pipelines.train import train
from lowrank.report.events import JobFinished, JobMoved, StepDone
from tests.pipelines.live_runs import Killed, ScriptedReporter, kill, make_world, run, settings, weights


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def answer(out: Path, number: int) -> CommandReply:
    return replies(out)[number]


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> ScriptedReporter:
    return run(settings(world, tmp_path_factory.mktemp("undisturbed") / "run"))[1]


def job(world: Path, name: str, **changes: Any) -> dict[str, Any]:
    """The complete settings of one job more."""
    given = settings(world, Path("unused"), jobs=[{"name": name, **changes}])
    return RunConfig(**given).jobs[0].model_dump(mode="json")


def test_the_others_do_not_notice(world: Path, tmp_path: Path, undisturbed: ScriptedReporter) -> None:
    """`a` beside jobs that come, are cloned, paused, go on and are stopped: the same losses to rounding."""
    out = tmp_path / "run"
    summary, received = run(
        settings(world, out),
        a2=lambda: send(out, "add", values={"settings": job(world, "c", adapter={"rank": 2}, seed=7)}),
        a3=lambda: send(out, "pause", "b"),
        a5=lambda: send(out, "clone", "c", {"changes": ["optimizer.learning_rate=1e-3"], "name": "d"}),
        a6=lambda: send(out, "resume", "b"),
        a8=lambda: (send(out, "stop", "c"), send(out, "stop", "nobody")),
    )
    assert received.losses("a") == pytest.approx(undisturbed.losses("a"), abs=1e-6)
    assert received.losses("b") == pytest.approx(undisturbed.losses("b"), abs=1e-6), "paused and put back as it was"
    assert [replies(out)[number].done for number in range(1, 7)] == [True] * 5 + [False]
    assert "there is no job 'nobody'" in answer(out, 6).text
    moved = [(event.job, event.step, event.state) for event in received.events if isinstance(event, JobMoved)]
    assert moved == [("b", 3, "paused"), ("b", 3, "queued")]
    ends = {event.job: (event.step, event.reason) for event in received.events if isinstance(event, JobFinished)}
    assert ends == {"a": (12, "done"), "b": (12, "done"), "c": (6, "stopped"), "d": (12, "done")}
    assert len(received.losses("d")) == 12 - 3, "the clone goes on from the present step"
    assert {name: own["finished"] for name, own in summary["jobs"].items()}["c"] == "stopped"
    assert [one["name"] for one in json.loads((out / "config.json").read_text())["jobs"]] == ["a", "b", "c", "d"]
    assert (out / "c" / "last" / "adapter_model.safetensors").is_file()
    assert {one["name"]: one["state"] for one in read_state(out)["jobs"]} == {
        "a": "done", "b": "done", "c": "stopped", "d": "done",
    }  # fmt: skip


def send_everything(world: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """Commands before and after the checkpoint of step 4."""
    return {
        "a2": lambda: send(out, "set", "b", {"changes": ["optimizer.learning_rate=0.003"]}),
        "a3": lambda: send(out, "add", values={"settings": job(world, "c", adapter={"rank": 2})}),
        "a5": lambda: send(out, "pause", "b"),
        "a6": lambda: (
            send(out, "clone", "a", {"changes": ["optimizer.learning_rate=0.02"]}),
            send(out, "resume", "b"),
        ),
    }


def as_former(run: Path) -> None:
    """The run folder as it was written before 2026-12."""
    (run / "commands").rename(run / "orders")
    log = run / "orders" / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace('"iteration": ', '"tick": '), encoding="utf-8")
    for path in (run / "checkpoints").glob("*/state.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        live = content["state"]["live"]
        live["orders"] = live.pop("commands")
        for job in content["jobs"]:
            state = path.parent / job / "state.json"
            kept = json.loads(state.read_text(encoding="utf-8"))
            kept["feed"] = kept.pop("dataloader")
            state.write_text(json.dumps(kept), encoding="utf-8")
            content["bytes"][f"{job}/state.json"] = state.stat().st_size
        path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("former", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_and_resumed_each_command_counts_once(world: Path, tmp_path: Path, former: bool) -> None:
    """Killed after step 9, the run goes on from step 4: what was sent between happens again, at its step, to the
    same bits; what came before is in the checkpoint."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(settings(world, whole, save_steps=4, save_total_limit=None), **send_everything(world, whole))
    plan = {**send_everything(world, cut), "a9": kill}
    with pytest.raises(Killed):
        run(settings(world, cut, save_steps=4, save_total_limit=None), **plan)
    remove(cut / "checkpoints/step-000008")  # as if it had not come to that
    if former:
        as_former(cut)
    before = replies(cut)
    assert len(before) == 5
    assert all(each.done for each in before.values())
    _, again = run(settings(world, cut, save_steps=4, resume=True, save_total_limit=None))
    assert replies(cut) == before, "a command that was answered is not answered again"
    one, other = weights(whole), weights(cut)
    assert {name.partition("/")[0] for name in one} == {"a", "a-2", "b", "c"}
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(again.losses("c")) == 12 - 1, "c had taken one step"
    assert [(cut / name).exists() for name in ("commands", "orders")] == [True, False]


def test_a_folder_of_a_former_run_is_written_and_read_until_the_run_goes_on(tmp_path: Path) -> None:
    send(tmp_path, "stop", "a")
    (tmp_path / "commands").rename(tmp_path / "orders")
    former = CommandQueue(tmp_path)
    assert send(tmp_path, "pause", "b").number == 2
    former.acknowledge(former.due(3)[0], 3, "a is over", done=True)
    former.write_state({"time": 1.0})
    assert not (tmp_path / "commands").exists()
    assert read_state(tmp_path) == {"time": 1.0}

    queue = CommandQueue(tmp_path, carried_out=[1])
    queue.open()
    assert not (tmp_path / "orders").exists()
    assert replies(tmp_path)[1].text == "a is over"
    assert [(each.number, each.kind, each.job) for each in queue.due(4)] == [(2, "pause", "b")]
    assert send(tmp_path, "resume", "b").number == 3


@pytest.mark.slow
def test_killed_between_a_command_and_its_reply(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    add = lambda: send(out, "add", values={"settings": job(world, "c", adapter={"rank": 2})})  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(CommandQueue, "acknowledge", lambda *_, **__: kill())
        with pytest.raises(Killed):
            run(settings(world, out, save_steps=2), a3=add)
    assert not replies(out)
    summary, _ = run(settings(world, out, save_steps=2, resume=True))
    assert answer(out, 1).done
    assert list(summary["jobs"]) == ["a", "b", "c"]
    assert summary["jobs"]["c"]["steps"] == 12


def test_what_is_set_holds_from_the_next_step_on(world: Path, tmp_path: Path, undisturbed: ScriptedReporter) -> None:
    out = tmp_path / "run"
    changes = ["optimizer.learning_rate=0.001", "schedule.type=constant", "schedule.warmup_steps=0", "max_steps=8"]
    _, received = run(settings(world, out), b5=lambda: send(out, "set", "b", {"changes": changes}))
    rates = [event.learning_rate for event in received.events if isinstance(event, StepDone) and event.job == "b"]
    assert rates[5:] == [0.001] * 3, answer(out, 1).text
    assert received.losses("b")[:6] == pytest.approx(undisturbed.losses("b")[:6], abs=1e-6)
    assert received.losses("b")[6] != pytest.approx(undisturbed.losses("b")[6], abs=1e-6)
    assert received.losses("a") == pytest.approx(undisturbed.losses("a"), abs=1e-6)


def test_what_cannot_be_is_refused_and_disturbs_nobody(
    world: Path, tmp_path: Path, undisturbed: ScriptedReporter
) -> None:
    out = tmp_path / "run"
    given = job(world, "c")

    def everything() -> None:
        send(out, "set", "a", {"changes": ["adapter.rank=8"]})
        send(out, "set", "a", {"changes": ["optimizer.learning_rate=-1"]})
        send(out, "set", "a", {"changes": ["optimizer.lerning_rate=1"]})
        send(out, "set", "a", {"changes": ["max_steps=2"]})
        send(out, "clone", "a", {"changes": ["adapter.rank=8"]})
        send(out, "resume", "a")
        send(out, "add", values={"settings": {**given, "data": {"train": ["nothing.json"]}}})
        send(out, "add", values={"settings": given})
        send(out, "add", values={"settings": given})
        send(out, "add", values={"settings": job(world, "d", adapter={"target_modules": ["nothing_proj"]})})
        send(out, "priority", "a", {"priority": "high"})
        send(out, "add")
        (out / "commands" / "000014.json").write_text("{", encoding="utf-8")

    _, received = run(settings(world, out), a3=everything, b12=lambda: send(out, "stop", "b"))
    refusals = {number: each.text for number, each in replies(out).items() if not each.done}
    for number, message in {
        1: "adapter.rank cannot change while a trains",
        2: "a number above 0",
        3: "did you mean 'learning_rate'",
        4: "a has taken 3 steps already",
        5: "clone it from its start",
        6: "a is not paused",
        7: "nothing.json",
        9: "used more than once",
        10: "nothing_proj",
        11: "cannot be understood",
        12: "cannot be understood",
        14: "000014.json is not a command",
        15: "b is over (done)",
    }.items():
        assert message in refusals[number], (number, refusals[number])
    assert answer(out, 8).done
    assert received.losses("a") == pytest.approx(undisturbed.losses("a"), abs=1e-6)


def test_a_higher_priority_takes_a_slot_and_gives_it_back(
    world: Path, tmp_path: Path, undisturbed: ScriptedReporter
) -> None:
    """One slot: `a` gives way to `b` after step 4 and goes on where it was when `b` is over."""
    out = tmp_path / "run"
    first = lambda: send(out, "priority", "b", {"priority": 1})  # noqa: E731
    summary, received = run(settings(world, out, max_concurrent_jobs=1), a4=first)
    order = [(event.job, event.step) for event in received.events if isinstance(event, StepDone)]
    expected = [("a", step) for step in range(1, 5)] + [("b", step) for step in range(1, 13)]
    assert order == expected + [("a", step) for step in range(5, 13)]
    assert received.losses("a") == pytest.approx(undisturbed.losses("a"), abs=1e-6)
    assert [own["finished"] for own in summary["jobs"].values()] == ["done", "done"]


def test_two_writers_never_share_a_number(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        sent = list(pool.map(lambda place: send(tmp_path, "stop", f"job-{place}").number, range(100)))
    assert sorted(sent) == list(range(1, 101))
    assert {each.job for each in CommandQueue(tmp_path).due(0)} == {f"job-{place}" for place in range(100)}


def test_steered_from_another_thread(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the methods of LiveRun, and by the commands."""
    out = tmp_path / "run"
    summary: dict[str, Any] = {}
    given = RunConfig(**settings(world, out, max_steps=5_000, eval_steps=2_000))
    trainer = threading.Thread(target=lambda: summary.update(train(given)))
    trainer.start()
    try:
        live = lowrank.LiveRun(out, timeout=60, wait=60)
        assert "c trains from now on" in live.add({"name": "c", "adapter": {"rank": 2}})
        with pytest.raises(lowrank.ConfigError, match="is a job of this run already"):
            live.add({"name": "c"})
        with pytest.raises(lowrank.ConfigError, match="did you mean 'adapter'"):
            live.add({"name": "d", "adaptor": {}})
        (tmp_path / "d.yaml").write_text("adapter: {rank: 16}\nseed: 3\n", encoding="utf-8")
        for arguments in (
            ["add", str(out), str(tmp_path / "d.yaml")],
            ["pause", str(out), "b"],
            ["set", str(out), "a", "optimizer.learning_rate=1e-5"],
            ["clone", str(out), "a", "adapter.rank=3", "--from-start", "--name", "e"],
            ["priority", str(out), "b", "2"],
            ["resume", str(out), "b"],
            ["stop", str(out), "c", "--json"],
        ):
            run_command(arguments)
        assert "c is over after step" in json.loads(capsys.readouterr().out.splitlines()[-1])["answer"]
        with pytest.raises(lowrank.OutputError, match="did you mean 'a'"):
            live.stop("aa")
        run_command(["jobs", str(out), "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["training"]
        assert {one["name"]: one["priority"] for one in found["jobs"]} == {"a": 0, "b": 2, "c": 0, "d": 0, "e": 0}
        live.end()
    finally:
        (out / "stop").touch()
        trainer.join(60)
    assert summary["interrupted"]
    assert not live.training
    with pytest.raises(lowrank.OutputError, match="is not training"):
        live.pause("a")
    run_command(["jobs", str(out)])
    assert "is not training" in capsys.readouterr().out


def run_command(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
