"""`lowrank demo`: the claim on the first screen of the README, as a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lowrank
from lowrank.checkpoints.atomic import current
from lowrank.config import load
from tests import command_line

DEMO = Path(lowrank.__file__).parent / "data" / "demo" / "demo.yaml"


def run(folder: Path, *changes: str) -> dict[str, Any]:
    """The last line that the demo prints, which lies in its folder too."""
    ran = command_line.lowrank("demo", *changes, "--output-dir", str(folder), "--json")
    assert ran.returncode == 0, ran.stderr[-2000:] + ran.stdout[-2000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == result
    return result


@pytest.mark.timeout(900)
def test_exact_match_on_held_out_questions_rises_from_under_10_to_over_90_percent(tmp_path: Path) -> None:
    """Its best adapter, as every adapter alone is the same to the bit (train/test_isolation.py)."""
    (best,) = [job for job in load(DEMO, []).jobs if job.name == "r16"]
    job = {"name": best.name, "adapter": {"rank": getattr(best.adapter, "rank", None)}}
    result = run(tmp_path / "run", f"jobs={json.dumps([job])}", "eval_steps=null")
    assert result["exact_match"].keys() == {"base", "r16"}
    assert result["exact_match"]["base"] < 0.1
    assert result["exact_match"]["r16"] > 0.9
    adapter = current(Path(str(result["adapter"])))
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_adapters_at_once(tmp_path: Path) -> None:
    """As it is: about a minute."""
    result = run(tmp_path / "run")
    scores = result["exact_match"]
    assert len(scores) == 4
    assert scores["base"] < 0.1
    assert scores[str(result["best"])] == max(scores.values())
    assert max(scores.values()) > 0.9
    jobs = json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["jobs"]
    assert {job["finished"] for job in jobs.values()} == {"done"}


def test_it_is_three_adapters_on_the_shipped_base() -> None:
    config = load(DEMO, [])
    assert config.model.path == "lowrank/tiny"
    assert [job.name for job in config.jobs] == ["r4", "r16", "r16-slow"]
    assert {source.path for job in config.jobs for source in job.data.eval} == {"lowrank/demo-heldout"}
