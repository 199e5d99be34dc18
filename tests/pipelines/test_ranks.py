"""Several processes train one run: to the bits of one process, from one another's checkpoints, and never a hang."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lowrank.config import RunConfig
from lowrank.errors import ConfigError, ModelError
from lowrank.pipelines.data_parallel import ProcessesFailed, _with_error
from lowrank.pipelines.launch import train
from lowrank.pipelines.processes import Child
from lowrank.pipelines.train import train as train_here
from lowrank.report.events import Event, RunFinished, StepDone
from lowrank.report.reporters.metrics import read_metrics
from tests.checkpoint_folder import write_alpaca
from tests.command_line import lowrank
from tests.pipelines.forked import forked_processes
from tests.pipelines.live_runs import make_world, weights
from tests.pipelines.live_runs import settings as live_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def settings(world: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Two jobs with everything that draws random numbers."""
    own = {
        "save_steps": 3,
        "logging_steps": 1,
        "max_steps": 40,
        "parallelism": "data",
        "jobs": [
            {"name": "lora", "adapter": {"rank": 4, "dropout": 0.1}},
            {"name": "dora", "adapter": {"type": "dora", "rank": 8}, "neftune_noise_alpha": 5.0},
        ],
    }
    return live_settings(world, out, **{**own, **changes})


def process_of(rank: int) -> psutil.Process:
    """Of the children of this one."""
    for child in psutil.Process().children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"there is no rank {rank}")


class At:
    """A reporter that does something once, after a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act, self.events, self.at = step, act, [], 0.0

    def report(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone) and event.step == self.step and not self.at:
            self.at = time.monotonic()
            self.act()

    def close(self) -> None:
        pass


def losses(out: Path) -> list[Any]:
    lines = [line for line in read_metrics(out / "metrics.jsonl") if line["event"] in ("step", "eval")]
    kept = ("event", "job", "step", "loss", "grad_norm", "metrics", "best")
    return sorted(([line.get(name) for name in kept] for line in lines), key=str)


def test_a_rank_is_killed_and_one_process_goes_on(world: Path, tmp_path: Path) -> None:
    """All end in seconds with its words; what one process makes of the checkpoint is the straight run's, to the bit."""
    with forked_processes() as ranks:
        killing = At(8, lambda: next(rank for rank in ranks if rank.environment["RANK"] == "1").kill())
        with pytest.raises(ProcessesFailed, match=r"^rank 1: it was killed \(SIGKILL\)$"):
            train(RunConfig(**settings(world, tmp_path / "two", devices=2)), reporters=[killing])
    assert time.monotonic() - killing.at < 60, "loaded machines are slow, a time limit is hours"
    assert len(ranks) == 2
    assert None not in [rank.returncode for rank in ranks]
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir()) >= ["step-000006"]

    resumed = train(RunConfig(**settings(world, tmp_path / "two", resume=True)))
    straight = train_here(RunConfig(**settings(world, tmp_path / "one", lanes=2)))
    assert not resumed["interrupted"]
    two, one = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert two.keys() == one.keys()
    assert all(torch.equal(two[name], one[name]) for name in one)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    same = ("steps", "train_tokens", "first_loss", "last_loss", "best_eval")
    for name, job in straight["jobs"].items():
        assert [job[each] for each in same] == [resumed["jobs"][name][each] for each in same]
    kept = json.loads(next((tmp_path / "two" / "checkpoints").iterdir()).joinpath("state.json").read_text())
    assert kept["state"]["settings"]["lanes"] == 2


def test_whose_error_is_said(tmp_path: Path) -> None:
    """A rank that leaves the words to the first one may end before it; one that was killed has none."""

    def child(code: int, error: str | None = None) -> Child:
        return Child("rank", (), tmp_path, tmp_path / "log", {}, code, error)

    first, silent, killed, other = child(4, "damaged"), child(4), child(-9), child(4, "another")
    assert _with_error(silent, [first, silent]) is first
    assert _with_error(killed, [first, killed]) is killed
    assert _with_error(other, [first, other]) is other
    assert _with_error(silent, [killed, silent]) is silent


@pytest.mark.slow
def test_an_error_that_all_find_is_said_once_and_as_on_one_device(world: Path, tmp_path: Path) -> None:
    """What only loading finds: a weight is cut short."""
    shutil.copytree(world / "model", tmp_path / "model")
    weights_file = tmp_path / "model" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-9])
    own = settings(world, tmp_path / "run")
    own["model"]["path"] = str(tmp_path / "model")
    with pytest.raises(ModelError) as alone:
        train(RunConfig(**own))
    with pytest.raises(ProcessesFailed) as together, forked_processes() as ranks:
        train(RunConfig(**own, devices=2))
    assert str(together.value) == str(alone.value)
    assert together.value.exit_code == alone.value.exit_code
    assert {rank.returncode for rank in ranks} == {alone.value.exit_code}


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_one_two_and_four_ranks(world: Path, tmp_path: Path, storage: str) -> None:
    """Also of a packed base, and a checkpoint of one process that four go on with. About 2 minutes each."""
    given = {"lanes": 4, "max_steps": 8}
    for devices in (1, 2, 4):
        own = settings(world, tmp_path / str(devices), devices=devices, **given)
        own["model"]["storage"] = storage
        train(RunConfig(**own))
    whole = weights(tmp_path / "1")
    for devices in (2, 4):
        found = weights(tmp_path / str(devices))
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert losses(tmp_path / str(devices)) == losses(tmp_path / "1")
    own = settings(world, tmp_path / "stopped", **given)
    own["model"]["storage"] = storage
    stopping = At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(RunConfig(**own), reporters=[stopping])["interrupted"]
    train(RunConfig(**{**own, "devices": 4, "resume": True}))
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "stopped").items())


@pytest.mark.slow
def test_answers_and_comparisons_on_two_and_four_ranks(world: Path, tmp_path: Path) -> None:
    """GRPO whose answers are used twice, PPO with values, DPO with references, a metric of generated answers."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(12)))
    pairs = tmp_path / "pairs.jsonl"
    row = {"chosen": "1 2 3", "rejected": "no"}
    pairs.write_text("".join(json.dumps({"prompt": f"Count to {n}.", **row}) + "\n" for n in range(12)))
    rollouts = {"reward_funcs": ["tests.train.rewards:digits"], "max_completion_length": 6}
    jobs = [
        {"name": "grpo",
         "objective": {"type": "grpo", "num_generations": 2, "num_iterations": 2, "beta": 0.1, **rollouts},
         "data": {"train": [str(prompts)], "batch_size": 2}},
        {"name": "ppo", "objective": {"type": "ppo", **rollouts}, "data": {"train": [str(prompts)], "batch_size": 2}},
        {"name": "dpo", "objective": "dpo", "data": {"train": [str(pairs)], "batch_size": 4}},
        {"name": "sft", "eval_metric": "exact_match", "data": {"validation_split": 0.2}},
    ]  # fmt: skip
    for devices in (1, 2, 4):
        given = settings(world, tmp_path / str(devices), devices=devices, lanes=4, max_steps=4, jobs=jobs)
        given["data"] = {"train": [str(world / "train.json")], "batch_size": 4}
        given |= {"eval_steps": 2}
        train(RunConfig(**given), allow_code=True)
    one = weights(tmp_path / "1")
    assert {name.partition("/")[0] for name in one} == {"grpo", "ppo", "dpo", "sft"}
    for devices in ("2", "4"):
        found = weights(tmp_path / devices)
        assert all(torch.equal(found[name], value) for name, value in one.items())
        assert losses(tmp_path / devices) == losses(tmp_path / "1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parent", "rank 1", "file"])
def test_a_request_to_stop_saves_on_all_ranks(world: Path, tmp_path: Path, how: str) -> None:
    def request_stop() -> None:
        if how == "parent":
            os.kill(os.getpid(), signal.SIGTERM)
        elif how == "file":
            (tmp_path / "run" / "stop").touch()
        else:
            process_of(1).send_signal(signal.SIGTERM)

    stopping = At(4, request_stop)
    given = settings(world, tmp_path / "run", devices=2, max_steps=3000, save_steps=None)
    summary = train(RunConfig(**given), reporters=[stopping])
    assert summary["interrupted"]
    assert isinstance(stopping.events[-1], RunFinished)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert 4 <= int(checkpoint.name.removeprefix("step-")) < 3000
    assert {job["steps"] for job in summary["jobs"].values()} == {int(checkpoint.name.removeprefix("step-"))}


@pytest.mark.slow
def test_torchrun_starts_the_same(world: Path, tmp_path: Path) -> None:
    """By its own command line, with an error that all find and only one says; then the run."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings(world, tmp_path / "torchrun", max_steps=6)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lowrank", "train"]
    wrong = subprocess.run([*torchrun, str(file), "data.batch_size=none"], capture_output=True, text=True)
    assert wrong.returncode
    assert wrong.stderr.count("data.batch_size") >= 1
    done = subprocess.run([*torchrun, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/6  lora held-out") == 1, "one of them speaks"
    train_here(RunConfig(**settings(world, tmp_path / "one", lanes=2, max_steps=6)))
    one = weights(tmp_path / "one")
    assert all(torch.equal(value, one[name]) for name, value in weights(tmp_path / "torchrun").items())

    # and in a process group that somebody else has made, as Ray Train does
    script = tmp_path / "there.py"
    script.write_text(
        "import sys, torch.distributed as dist, lowrank\n"
        "dist.init_process_group('gloo')\n"
        "run = lowrank.train(sys.argv[1], output_dir=sys.argv[2], progress=False)\n"
        "assert run.summary['jobs']['lora']['steps'] == 6 and dist.is_initialized()\n"
        "dist.destroy_process_group()\n"
    )
    arguments = [*torchrun[:5], str(script), str(file), str(tmp_path / "there")]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(value, one[name]) for name, value in weights(tmp_path / "there").items())


@pytest.mark.slow
def test_ranks_that_are_not_alike(world: Path, tmp_path: Path) -> None:
    """Data of another machine, and another setting: named before anything loads, each on both."""
    write_alpaca(tmp_path / "mine.json", 24)
    write_alpaca(tmp_path / "theirs.json", 23)
    processes = []
    for rank, (data, rate) in enumerate([("mine", 0.01), ("theirs", 0.02)]):
        own = settings(world, tmp_path / f"run{rank}", optimizer={"learning_rate": rate})
        own["data"]["train"] = [str(tmp_path / f"{data}.json")]
        file = tmp_path / f"{rank}.json"
        file.write_text(json.dumps(own))
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "lowrank", "train", str(file)],
                env={**os.environ, **environment},
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "learning_rate" in outputs[0]
    assert "the training data of job lora differ from those of rank 0" in outputs[0]
    assert "rank 1 on" in outputs[0]
    assert outputs[1].count("learning_rate") == 0, "the first one has said it"


def test_numbers_that_do_not_go_together(world: Path, tmp_path: Path) -> None:
    from lowrank.pipelines.rank_placement import choose_lanes
    from tests.train.rank_threads import on_ranks

    outputs: list[Any] = []

    def lanes(world_size: int, before: dict[str, Any] | None = None, **changes: Any) -> list[int]:
        config = RunConfig(**settings(world, tmp_path / "x", **changes))
        return on_ranks(world_size, lambda ranks: choose_lanes(config, before, ranks, outputs.append).count)

    assert lanes(2) == [2, 2]
    assert lanes(2, lanes=8) == [8, 8]
    assert lanes(1) == [1]
    assert lanes(1, {"lanes": 4}) == [4]
    assert lanes(2, {"lanes": 4}) == [4, 4]
    assert not outputs
    assert lanes(2, {"lanes": 1}) == [2, 2]
    assert "the same to rounding, not to the bit" in outputs[0].text
    with pytest.raises(ConfigError, match="lanes: 3 is no power of two"):
        lanes(3)
    with pytest.raises(ConfigError, match=r"devices: 4 do not divide the 2 lanes.*train on 1, 2"):
        lanes(4, lanes=2)
    with pytest.raises(ConfigError, match="layerwise"):
        lanes(2, tuning="full", optimizer={"layerwise": True, "max_grad_norm": None}, jobs=[])


def test_the_plan_of_a_device_is_of_its_part_of_a_step(world: Path, tmp_path: Path) -> None:
    """The base and the adapters are whole on each, the activations are those of the heaviest lane; nobody has to have
    the devices."""
    file = tmp_path / "run.json"
    file.write_text(json.dumps(settings(world, tmp_path / "x")))

    def planned(*arguments: str) -> dict[str, Any]:
        done = lowrank("plan", str(file), "--json", "--brief", "data.batch_size=8", *arguments)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one, eight = planned(), planned("devices=8")
    for part in ("base", "adapters", "optimizer"):
        assert eight["plan"]["step"][part] == one["plan"]["step"][part]
    assert eight["plan"]["step"]["activations"] < 0.25 * one["plan"]["step"]["activations"]
    assert "devices" not in one
    sent = eight["devices"]["bytes_sent_per_step"]
    assert sent >= int(2 * eight["plan"]["step"]["gradients"] * 7 / 8)
