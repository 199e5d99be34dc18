"""`lowrank demo`: the claim on the first screen of the README, as a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank
from lowrank.checkpoints.atomic import current

TINY = Path(lowrank.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """The demo's run folder and the last line it prints."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "lowrank", "demo", "--output-dir", str(folder), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=840)
    assert result.returncode == 0, result.stderr[-2000:] + result.stdout[-2000:]
    return folder, json.loads(result.stdout.splitlines()[-1])


@pytest.mark.timeout(900)
def test_exact_match_on_held_out_questions_rises_from_under_10_to_over_90_percent(
    demo: tuple[Path, dict[str, dict[str, float]]],
) -> None:
    result = demo[1]
    scores = result["exact_match"]
    assert len(scores) == 4
    assert scores["base"] < 0.1
    assert scores[str(result["best"])] == max(scores.values())
    assert max(scores.values()) > 0.9


@pytest.mark.timeout(900)
def test_what_the_demo_names_is_there(demo: tuple[Path, dict[str, object]]) -> None:
    folder, result = demo
    adapter = current(Path(str(result["adapter"])))
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (folder / "loss.png").stat().st_size > 10_000
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == result
    finished = {job["finished"] for job in json.loads((folder / "summary.json").read_text("utf-8"))["jobs"].values()}
    assert finished == {"done"}
