"""Every objective on answers learns something that shows on rows it never saw: the examples, run to their ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowrank.config import validate_settings
from lowrank.pipelines.train import train
from lowrank.report.reporters.metrics import read_metrics
from lowrank.settings import configs_in

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, dict[str, float]]:
    """`{job: metrics of its last evaluation}`. `changes`: keys in the place of the example's."""
    monkeypatch.chdir(ROOT)
    given = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text("utf-8"))
    summary = train(validate_settings({**given, "output_dir": str(tmp_path / "run"), **changes}))
    jobs = {job: {**own["eval_metrics"], "loss": own["last_eval"]["loss"]} for job, own in summary["jobs"].items()}
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "eval"]
    assert {line["job"] for line in lines} == set(jobs)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["jobs"].keys() == jobs.keys()
    return jobs


UNTOUCHED = {"name": "untouched", "optimizer": {"learning_rate": 1e-12}}
"""A job that stays what the base is."""


def held_out_losses(config: dict[str, Any]) -> dict[str, float]:
    """Of each job at its end."""
    return {name: job["last_eval"]["loss"] for name, job in train(validate_settings(config))["jobs"].items()}


def test_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The untouched base prefers the right answer in 61 of 100 pairs; measured afterwards: 69, 79, 99, 83 and 99."""
    jobs = run("07_preferences", tmp_path, monkeypatch)
    least = {"dpo": 0.65, "ipo": 0.7, "orpo": 0.93, "simpo": 0.75, "cpo": 0.93}  # dpo: see the next test
    for name, share in least.items():
        assert jobs[name]["rewards/accuracies"] >= share, name
        assert jobs[name]["rewards/margins"] > 0, name


def test_dpo_with_other_orders_of_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the pairs moves the result: seeds 0 to 7 and 43 to 51 gave 73 to 87 of 100, 78 in the mean; the
    example's 42 gave 69."""
    seeds = {"jobs": [{"name": str(seed), "seed": seed, "objective": {"type": "dpo"}} for seed in range(4)]}
    jobs = run("07_preferences", tmp_path, monkeypatch, **seeds)
    shares = [job["rewards/accuracies"] for job in jobs.values()]
    assert sum(shares) / len(shares) >= 0.74, shares
    assert min(shares) >= 0.7, shares


def test_conversations_pairs_and_ratings_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = run("08_sft_dpo_kto", tmp_path, monkeypatch)
    assert jobs["sft"]["loss"] < 0.3
    assert jobs["dpo"]["rewards/accuracies"] >= 0.8
    assert jobs["kto"]["loss"] < 0.48  # 0.5 is to know nothing
    assert jobs["kto"]["rewards/margins"] > 0


@pytest.mark.usefixtures("allowed_code")
@pytest.mark.parametrize(("name", "least"), [("11_grpo", 0.45), ("12_ppo", 0.5)])
def test_rewards_for_its_own_answers(name: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 100 held-out prompts the untouched base has a mean reward of 0.1. Measured: GRPO 0.66 after 80 steps; PPO
    0.28, 0.48, 0.64, 0.73 after each 40."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    jobs = run(name, tmp_path, monkeypatch)
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["event"] == "eval"]
    assert lines[0]["step"] == 0
    assert lines[0]["metrics"]["reward"] < 0.15
    assert jobs["default"]["reward"] > least


def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training on held-in dialogues as plain text: sentences of held-out ones become likelier."""
    monkeypatch.chdir(ROOT)
    texts = tmp_path / "texts.jsonl"
    held_out = tmp_path / "held_out.jsonl"
    for path, name in ((texts, "train"), (held_out, "heldout")):
        rows = [json.loads(line) for line in (ROOT / f"lowrank/data/demo/{name}.jsonl").read_text("utf-8").splitlines()]
        lines = [json.dumps({"text": _spoken(row)}, ensure_ascii=False) for row in rows[:400]]
        path.write_text("\n".join(lines) + "\n", "utf-8")
    config = {
        "model": "lowrank/tiny",
        "objective": "pretrain",
        "jobs": [{"name": "trained"}, UNTOUCHED],
        "data": {
            "train": {"path": str(texts), "format": "text"},
            "eval": {"path": str(held_out), "format": "text", "max_samples": 100},
            "batch_tokens": 1024,
        },
        "optimizer": {"learning_rate": 3e-3},
        "max_steps": 60,
        "eval_steps": 60,
        "output_dir": str(tmp_path / "run"),
    }
    losses = held_out_losses(config)
    assert losses["trained"] < 0.6 * losses["untouched"], losses


def _spoken(row: dict[str, Any]) -> str:
    return " ".join(message["content"] for message in row["messages"])


VARIANTS = sorted(set(configs_in("lowrank.adapters.variants")) - {"loftq"})  # that one is lora but for its start


def test_every_variant_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As jobs of one run: each learns what its held-out rows ask for."""
    monkeypatch.chdir(ROOT)
    quick = {"vera": 3e-2, "ia3": 3e-2, "oft": 1e-2, "lora_fa": 1e-2, "adalora": 1e-2}
    quick |= {"prompt_tuning": 3e-2, "prefix_tuning": 3e-2}
    jobs: list[dict[str, Any]] = [UNTOUCHED]
    for name in VARIANTS:
        adapter = {"type": name, **({"block_size": 16} if name == "oft" else {"rank": 16})}
        jobs.append({"name": name, "adapter": adapter, "optimizer": {"learning_rate": quick.get(name, 3e-3)}})
    config = {
        "model": "lowrank/tiny",
        "data": {"train": "lowrank/demo", "eval": {"path": "lowrank/demo-heldout", "max_samples": 100}},
        "schedule": {"type": "cosine", "warmup_ratio": 0.1},
        "max_steps": 60,
        "eval_steps": 60,
        "output_dir": str(tmp_path / "run"),
        "jobs": jobs,
    }
    losses = held_out_losses(config)
    learned = {name: loss / losses["untouched"] for name, loss in losses.items() if name != "untouched"}
    assert learned.keys() == set(VARIANTS)
    assert max(learned.values()) < 0.6, learned


def test_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("09_reward_model", tmp_path, monkeypatch)["default"]["rewards/accuracies"] >= 0.58
