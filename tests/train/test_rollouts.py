"""Jobs that learn from their own answers: beside others, stopped and gone on with, on any prompts."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from lowrank.board.sentences import in_chinese
from lowrank.config import RunConfig
from lowrank.errors import ConfigError
from lowrank.pipelines.artifacts import find_artifacts
from lowrank.pipelines.inference import open_inference_model
from lowrank.pipelines.train import train
from lowrank.records import Conversation, Message
from lowrank.report.events import EvalDone, Event, Notice, StepDone
from lowrank.report.summary import UNTRAINED_BEST
from lowrank.report.summary_view import render_summary
from tests.train import rewards

pytestmark = pytest.mark.usefixtures("allowed_code")

GRPO = {
    "type": "grpo",
    "reward_funcs": ["tests.train.rewards:digits", "tests.train.rewards:shortness"],
    "num_generations": 3,
    "max_completion_length": 6,
    "beta": 0.05,
}


class Ear:
    def __init__(self, stop_after: tuple[str, int] | None = None) -> None:
        self.events: list[Event] = []
        self.stop_after = stop_after

    def report(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepDone) and (event.job, event.step) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None: ...

    def steps(self, name: str) -> list[StepDone]:
        return [event for event in self.events if isinstance(event, StepDone) and event.job == name]

    def numbers(self, name: str) -> list[Any]:
        return [(step.loss, step.metrics) for step in self.steps(name)]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    rows = [{"prompt": f"Count to {n}.", "solution": n} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "prompts.jsonl")


def settings(prompts: str, out: Path, jobs: list[dict[str, Any]], **changes: Any) -> RunConfig:
    return RunConfig(
        **{
            "model": {"path": "lowrank/tiny", "device": "cpu", "dtype": "float32"},
            "output_dir": out,
            "data": {"train": prompts, "batch_size": 2, "max_length": 64},
            "optimizer": {"learning_rate": 5e-3},
            "adapter": {"rank": 2, "target_modules": ["q_proj", "v_proj"]},
            "schedule": "constant",
            "max_steps": 4,
            "jobs": jobs,
            "eval_steps": None,
            **changes,
        }
    )


def job(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "objective": {**GRPO, **changes}}


def adapter(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / "last" / "adapter_model.safetensors")


PPO = {
    "name": "ppo",
    "objective": {"type": "ppo", "reward_funcs": "tests.train.rewards:digits", "max_completion_length": 6},
}
SFT = {"name": "sft", "objective": "sft", "data": {"train": "lowrank/demo", "max_samples": 20, "batch_size": 4}}


def test_none_notices_another(prompts: str, tmp_path: Path) -> None:
    """Two GRPO jobs and an SFT job: each has the losses, answers and weights that it has alone."""
    jobs = [job("one"), {**SFT}, job("two", num_iterations=2, loss_type="grpo"), {**PPO}]
    together = Ear()
    train(settings(prompts, tmp_path / "all", jobs), reporters=[together])
    assert together.numbers("one") != together.numbers("two")
    for own in jobs:
        name, alone = own["name"], Ear()
        train(settings(prompts, tmp_path / name, [own]), reporters=[alone])
        for (loss, metrics), (expected, known) in zip(together.numbers(name), alone.numbers(name), strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
            assert metrics == pytest.approx(known, rel=1e-4, abs=1e-6, nan_ok=True)
        expected = adapter(tmp_path / name, name)
        for key, value in adapter(tmp_path / "all", name).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(prompts: str, tmp_path: Path, step: int) -> None:
    """Stopped between two batches of answers (2), and between two steps on the same ones (3, and always with PPO)."""
    jobs = [job("one", num_iterations=2), {**PPO}]
    whole, first, rest = Ear(), Ear(stop_after=("one", step)), Ear()
    train(settings(prompts, tmp_path / "whole", jobs), reporters=[whole])
    train(settings(prompts, tmp_path / "cut", jobs), reporters=[first])
    assert len(first.steps("one")) == step
    train(settings(prompts, tmp_path / "cut", jobs, resume=True), reporters=[rest])
    for name in ("one", "ppo"):
        assert first.numbers(name) + rest.numbers(name) == whole.numbers(name)
        expected = adapter(tmp_path / "whole", name)
        for key, value in adapter(tmp_path / "cut", name).items():
            assert torch.equal(value, expected[key]), key


def test_answers_are_used_again_as_often_as_asked(prompts: str, tmp_path: Path) -> None:
    ear = Ear()
    own = [job("one", num_iterations=2)]
    train(settings(prompts, tmp_path / "run", own, num_train_epochs=1, max_steps=None), reporters=[ear])
    steps = ear.steps("one")
    assert len(steps) == 12  # 12 prompts, 2 at a time, twice
    assert [a.metrics["reward"] == b.metrics["reward"] for a, b in zip(steps[::2], steps[1::2])] == [True] * 6
    assert len({step.metrics["reward"] for step in steps}) > 2
    assert steps[0].metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1].metrics["kl"] > 1e-6
    assert steps[0].loss == -steps[0].metrics["reward"]


def test_reward_functions_see_what_trls_see(prompts: str, tmp_path: Path) -> None:
    rewards.SEEN.clear()
    train(settings(prompts, tmp_path / "run", [job("one", reward_funcs="tests.train.rewards:noted")], max_steps=1))
    (seen,) = rewards.SEEN
    assert seen.keys() == {"prompts", "completions", "completion_ids", "prompt", "solution", "label"}
    assert len(seen["completions"]) == 6
    assert seen["label"] == [None] * 6
    for index, solution in enumerate(seen["solution"]):
        assert seen["prompts"][index] == [{"role": "user", "content": f"Count to {solution}."}]
        assert seen["solution"][index // 3 * 3] == solution  # the answers to a prompt stand side by side
        (message,) = seen["completions"][index]
        assert message["role"] == "assistant"
        assert len(seen["completion_ids"][index]) <= 6


def test_conversations_are_asked_without_their_last_answer(tmp_path: Path) -> None:
    rewards.SEEN.clear()
    data = {"train": "lowrank/demo", "max_samples": 4, "batch_size": 4}
    own = {**job("one", reward_funcs="tests.train.rewards:noted"), "data": data}
    train(settings("", tmp_path, [own], max_steps=1))
    (seen,) = rewards.SEEN
    for requested, row, label in zip(seen["prompts"], seen["messages"], seen["label"]):
        assert [dict(each) for each in row[:-1]] == requested
        assert row[-1]["content"] == label


def test_held_out_prompts_are_answered_before_and_after(prompts: str, tmp_path: Path) -> None:
    """The best adapter is the one with the highest held-out reward; a digit is easily learned."""
    ear = Ear()
    own = job("one", reward_funcs="tests.train.rewards:digits", beta=0.0, num_generations=8)
    data = {"train": prompts, "batch_size": 4, "validation_split": 0.25, "max_length": 64}
    summary = train(settings(prompts, tmp_path / "run", [own], data=data, max_steps=12, eval_steps=6), reporters=[ear])
    evals = [event for event in ear.events if isinstance(event, EvalDone)]
    assert [event.step for event in evals] == [0, 6, 12]
    assert all(event.loss == -event.metrics["reward"] for event in evals)
    assert evals[-1].metrics["reward"] > evals[0].metrics["reward"] + 0.1
    assert summary["jobs"]["one"]["best_eval"]["loss"] == min(event.loss for event in evals)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(line for line in lines if line["event"] == "step")
    for name in ("reward", "reward_std", "rewards/digits/mean", "completions/mean_length", "clip_ratio/region_mean"):
        assert name in step["metrics"]


def test_the_best_that_is_the_base_is_told_everywhere(prompts: str, tmp_path: Path) -> None:
    """Rewards that never differ: the first of equal evaluations is kept, which was before training."""
    own = [job("one", reward_funcs="tests.train.rewards:nothing", max_completion_length=2)]
    data = {"train": prompts, "eval": prompts, "batch_size": 2, "max_length": 64, "max_samples": 2}
    ear = Ear()
    summary = train(settings(prompts, tmp_path / "run", own, data=data, max_steps=1), reporters=[ear])
    assert summary["jobs"]["one"]["best_eval"]["step"] == 0
    assert [event for event in ear.events if isinstance(event, Notice) and event.text.startswith("best")] == [
        Notice(UNTRAINED_BEST, level="warning", job="one")
    ]
    assert summary["jobs"]["one"]["best_note"] == UNTRAINED_BEST
    notes: list[str] = []
    find_artifacts(str(tmp_path / "run"), notify=notes.append)
    assert notes == [f"one: {UNTRAINED_BEST}"]
    find_artifacts(str(tmp_path / "run"), which="last", notify=notes.append)
    assert len(notes) == 1
    console = Console(width=200, file=io.StringIO())
    console.print(render_summary(summary))
    assert f"Note      {UNTRAINED_BEST}" in console.file.getvalue()  # type: ignore[attr-defined]
    assert UNTRAINED_BEST in (tmp_path / "run" / "report.html").read_text().replace("&#39;", "'")
    assert in_chinese(UNTRAINED_BEST) is not None


def test_an_adapter_that_gives_nan_ends_alone(prompts: str, tmp_path: Path) -> None:
    rate = {"learning_rate": 3e38, "max_grad_norm": None, "max_skipped_steps": 1}  # any less, and norms hide it
    broken = {**job("broken", temperature=3.0, num_generations=8), "optimizer": rate}
    both, alone = Ear(), Ear()
    summary = train(settings(prompts, tmp_path / "both", [job("one"), broken]), reporters=[both])
    assert summary["jobs"]["broken"]["finished"] == "not_finite"
    train(settings(prompts, tmp_path / "alone", [job("one")]), reporters=[alone])
    losses = [[step.loss for step in ear.steps("one")] for ear in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_reward_function_that_fails_loses_nothing(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with a clear error, and goes on from where it was when the function is mended."""
    rewards.SEEN.clear()
    own = [job("one", reward_funcs="tests.train.rewards:failing_later")]
    own.insert(0, {**SFT})
    first, rest, whole = Ear(), Ear(), Ear()
    with pytest.raises(ConfigError, match=r"failing_later fails: RuntimeError: the judge is out"):
        train(settings(prompts, tmp_path / "cut", own), reporters=[first])
    rewards.SEEN.clear()
    train(settings(prompts, tmp_path / "cut", own, resume=True), reporters=[rest])
    monkeypatch.setattr(rewards, "failing_later", rewards.digits)
    train(settings(prompts, tmp_path / "whole", own), reporters=[whole])
    for name in ("one", "sft"):
        assert len(first.steps(name)) == len(rest.steps(name)) == 2
        assert first.numbers(name) + rest.numbers(name) == whole.numbers(name)


@pytest.mark.parametrize(("place", "which"), [("rm/rm/last", "last"), ("rm", "best")])
def test_a_reward_model_judges_as_it_does_elsewhere(prompts: str, tmp_path: Path, place: str, which: str) -> None:
    """Trained here, loaded beside the job: its rewards are those that `InferenceModel.rewards` gives for the same
    answers. A run folder stands for its best."""
    pairs = [{"prompt": f"Say {n}", "chosen": f"{n} {n}", "rejected": "no"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    judge = {"name": "rm", "objective": "reward", "data": {"train": str(tmp_path / "pairs.jsonl"), "batch_size": 4}}
    train(settings(prompts, tmp_path / "rm", [judge], max_steps=2))
    rewards.SEEN.clear()
    given = {"reward_model": str(tmp_path / place), "reward_funcs": "tests.train.rewards:noted"}
    ear = Ear()
    own = {"name": "ppo", "objective": {"type": "ppo", "max_completion_length": 24, **given}}
    data = {"train": prompts, "batch_size": 4}
    train(settings(prompts, tmp_path / "run", [own], max_steps=1, data=data), reporters=[ear])
    trained = open_inference_model(str(tmp_path / "rm"), which=which, notify=lambda text: None)
    expected = []
    for requested, answered in zip(rewards.SEEN[0]["prompts"], rewards.SEEN[0]["completions"]):
        chat = tuple(Message(each["role"], each["content"]) for each in [*requested, *answered])
        expected += trained.rewards([("rm", Conversation(chat))])
    (step,) = ear.steps("ppo")
    assert step.metrics["completions/clipped_ratio"] == 0  # all ended by themselves, so the texts are the same
    assert step.metrics["rewards/reward_model/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize(
    ("own", "described"),
    [
        ({"objective": "grpo"}, "objective.reward_funcs: grpo learns from rewards"),
        ({**job("one"), "tuning": "full"}, "holds the model to the base as it was"),
    ],
)
def test_refused_before_anything_loads(prompts: str, tmp_path: Path, own: dict[str, Any], described: str) -> None:
    with pytest.raises(ValueError, match=described):
        settings(prompts, tmp_path, [{"name": "one", **own}])
