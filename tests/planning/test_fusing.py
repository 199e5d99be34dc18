"""When jobs in the same passes pay: the model, and what it is fitted to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowrank.cli.main import main
from lowrank.planning.fusing import StepTime, fitted
from tests.checkpoint_folder import save_checkpoint_folder, write_alpaca


def test_a_model_is_found_again_in_its_own_times() -> None:
    known = StepTime(per_pass=0.5, per_token=0.001, per_job=0.02)
    one, large, four = known.of([64], 4096), known.of([1024], 4096), known.of([64] * 4, 4096)
    found = fitted((64, one), (1024, large), (4, 256, four))
    assert (found.per_pass, found.per_token, found.per_job) == pytest.approx((0.5, 0.001, 0.02))


def test_what_is_shared_is_paid_once_in_each_pass() -> None:
    step = StepTime(per_pass=1.0, per_token=0.001, per_job=0.0)
    assert step.of([100, 300], 4096) == pytest.approx(1.4)
    assert step.of([3000, 3000], 4096) == pytest.approx(2 + 6), "two passes"
    assert step.times_faster([100] * 8, 4096) == pytest.approx(8 * 1.1 / 1.8)
    assert step.times_faster([4096] * 4, 4096) == pytest.approx(1.0), "each fills passes of its own"


def test_a_disturbed_clock_makes_nothing_negative() -> None:
    found = fitted((64, 2.0), (1024, 1.0), (4, 256, 0.5))
    assert (found.per_pass, found.per_token, found.per_job) == (2.0, 0.0, 0.0)
    assert fitted((64, 1.0), (64, 1.0), (2, 128, 1.5)).per_token == 0.0


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_plan_says_what_training_together_saves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], jobs: int
) -> None:
    save_checkpoint_folder(tmp_path / "model")
    write_alpaca(tmp_path / "train.json", 12)
    settings = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(tmp_path / "train.json")], "batch_size": 2},
        "output_dir": str(tmp_path / "run"),
        "jobs": [{"name": f"j{number}"} for number in range(jobs)],
    }
    (tmp_path / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "run.json"), "--calibrate", "--brief", "--json"])
    assert ended.value.code == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["seconds_to_train"] > 0
    faster = speed["times_faster_than_one_after_another"]
    assert faster is None if jobs == 1 else 0.5 < faster <= 3
