"""Every objective on answers learns something that shows on rows it never saw: the examples, run to their ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank.config import load
from lowrank.run import train
from lowrank.train.reporters.metrics import read_metrics

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """`{job: metrics of its last evaluation}`."""
    monkeypatch.chdir(ROOT)
    summary = train(load(ROOT / "examples" / f"{name}.yaml", [f"output_dir={tmp_path / 'run'}"]))
    jobs = {job: {**own["eval_metrics"], "loss": own["last_eval"]["loss"]} for job, own in summary["jobs"].items()}
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "eval"]
    assert {line["job"] for line in lines} == set(jobs)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["jobs"].keys() == jobs.keys()
    return jobs


def test_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched base prefers the right answer in 61 of 100 pairs; measured afterwards: 79, 79, 99, 83 and 99."""
    jobs = run("07_preferences", tmp_path, monkeypatch)
    least = {"dpo": 0.7, "ipo": 0.7, "orpo": 0.93, "simpo": 0.75, "cpo": 0.93}
    for name, share in least.items():
        assert jobs[name]["rewards/accuracies"] >= share, name
        assert jobs[name]["rewards/margins"] > 0, name


def test_conversations_pairs_and_ratings_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = run("08_sft_dpo_kto", tmp_path, monkeypatch)
    assert jobs["sft"]["loss"] < 0.3
    assert jobs["dpo"]["rewards/accuracies"] >= 0.8
    assert jobs["kto"]["loss"] < 0.48  # 0.5 is to know nothing
    assert jobs["kto"]["rewards/margins"] > 0


def test_rewards_for_its_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO on 100 held-out prompts: the untouched base has a mean reward of 0.09; measured after 80 steps: 0.66."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    jobs = run("11_grpo", tmp_path, monkeypatch)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "eval"]
    assert lines[0]["step"] == 0
    assert lines[0]["metrics"]["reward"] < 0.15
    assert jobs["default"]["reward"] > 0.45


def test_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("09_reward_model", tmp_path, monkeypatch)["default"]["rewards/accuracies"] >= 0.58
