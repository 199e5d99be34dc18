"""The day there is a GPU is not spent on typing errors: the whole script runs on a processor."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_day import __main__ as gpu_day
from benchmarks.gpu_day import wheels

ROOT = Path(__file__).parents[2]
MEASURED = {"environment", "kernels", "training", "plans", "decoding", "profiles", "longest", "compiled"}


def test_every_section_runs_at_the_tiniest_size(tmp_path: Path) -> None:
    sections = [name for name in gpu_day.SECTIONS if name != "tests"]
    arguments = ["--rehearse", "--no-peers", "--cells", "1", "--sections", *sections, "--out", str(tmp_path)]
    assert gpu_day.main(arguments) == 0
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found.keys() >= MEASURED
    assert "failures" not in found
    (training,) = found["training"]
    steps = training["turns"]["lowrank"][0]["steps"]
    assert len(steps) == 3
    assert all(0 < step["grad_norm"][0] < 10 for step in steps)
    text = (tmp_path / "gpu_day.md").read_text()
    for heading in (
        "Training",
        "Plan and measured memory",
        "Answering",
        "Profile: ",
        "Longest document",
        "Answering through compiled layers",
    ):
        assert f"## {heading}" in text
    assert sum(seconds for _, seconds in gpu_day.SECTIONS.values()) <= 540


def test_a_section_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(day: object) -> None:
        raise RuntimeError("the card is on fire")

    monkeypatch.setitem(gpu_day.SECTIONS, "kernels", (breaks, 1.0))
    assert gpu_day.main(["--rehearse", "--sections", "kernels", "environment", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert "the card is on fire" in found["failures"][0]
    assert found["environment"]["versions"]["torch"]


def test_what_travels_is_what_is_missing_there() -> None:
    missing = wheels.needed({"datasets"}, {"torch", "numpy", "pyarrow", "pandas", "requests"}, "3.12")
    assert {"datasets", "dill", "multiprocess"} <= missing
    assert not missing & {"torch", "numpy", "pandas"}
    assert wheels.name_of("Huggingface_Hub==1.0") == "huggingface-hub"


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_the_whole_script_with_peers(tmp_path: Path) -> None:
    """As a person types it, in under 3 minutes (of processor time: other people's work stretches the rest)."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        ["bash", "benchmarks/gpu_day.sh", "--rehearse", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found.keys() >= {*MEASURED, "tests"}
    beside_trl = [each for each in found["training"] if "trl" in each["turns"]]
    assert len(beside_trl) == 5
    for each in beside_trl:
        ours, theirs = (turns[0]["steps"][0]["loss"] for turns in each["turns"].values())
        assert ours[0] == pytest.approx(theirs, rel=2e-3), "a fresh adapter changes nothing: the same rows and weights"
