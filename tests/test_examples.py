"""The ladder of examples runs, each on the base that ships with lowrank, a few steps of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import lowrank

ROOT = Path(__file__).parent.parent
OF_ITS_OWN = ("11_grpo", "12_ppo")
"""Four steps say nothing about their rewards."""
CONFIGS = [path for path in sorted((ROOT / "examples").glob("[0-9]*.yaml")) if path.stem not in OF_ITS_OWN]
SCRIPTS = [
    pytest.param(path, marks=pytest.mark.slow if path.stem == "10_export" else ())
    for path in sorted((ROOT / "examples").glob("[0-9]*.py"))
]
"""10_export takes most of a minute; tests/test_take_home.py does as much."""


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": "examples", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(*words: str) -> str:
    done = lowrank("train", *words, "--json", cwd=ROOT, PYTHONPATH="examples")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains(path: Path, tmp_path: Path) -> None:
    evaluates = ["eval_steps=4"] if "eval:" in path.read_text("utf-8") else []
    out = train(str(path), f"output_dir={tmp_path / 'run'}", "max_steps=4", *evaluates)
    summary = json.loads(out.splitlines()[-1])
    for job in summary["jobs"].values() if isinstance(summary["jobs"], dict) else summary["jobs"]:
        assert job["last_loss"] < job["first_loss"] + 0.2 * abs(job["first_loss"])


@pytest.mark.parametrize("name", OF_ITS_OWN)
def test_answers_of_its_own(name: str, tmp_path: Path) -> None:
    """A step of answers is drawn and judged; nothing can be learned of it in two."""
    short = ("max_steps=2", "data.batch_size=2", "data.max_samples=8")
    out = train(f"examples/{name}.yaml", f"output_dir={tmp_path / 'run'}", *short)
    (job,) = json.loads(out.splitlines()[-1])["jobs"].values()
    assert job["steps"] == 2
    assert {"reward", "rewards/mentions/mean", "completions/mean_length"} <= job["eval_metrics"].keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_runs(path: Path) -> None:
    assert "held out" in run(sys.executable, str(path), "4")
