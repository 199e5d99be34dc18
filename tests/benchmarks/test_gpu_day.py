"""The day there is a GPU is not spent on typing errors: the whole script runs on a processor."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent
from transformers.models.llama import modeling_llama

from benchmarks.gpu_day import __main__ as gpu_day
from benchmarks.gpu_day import profiling, training, wheels
from benchmarks.gpu_day.cells import CELLS, Cell
from benchmarks.gpu_day.day import Day
from benchmarks.gpu_day.device import Device
from benchmarks.gpu_day.peers import in_processes, twin_of
from benchmarks.gpu_day.shapes import base_of, make_model, sharing

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


def test_a_contender_leaves_no_parts_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As liger's patch of one model does (apply_liger_kernel_to_llama): the turns after it would run on its parts."""
    day = Day(Device("cpu"), tmp_path, 600.0, tiny=True, dtype=torch.float32)
    day.begin(600.0)
    (cell,) = (
        each
        for each in CELLS
        if (each.shape, each.storage) == ("Llama-3.1-8B", "dense") and each.peers and each.tokens == 2048
    )
    model = make_model(cell.shape, day.device, day.tiny, day.dtype)
    twin, before, patched = sharing(model), dict(vars(modeling_llama)), []

    def patches(*given: Any) -> dict[str, Any]:
        for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP", "_of_liger"):
            setattr(modeling_llama, name, patched.append)
        patched.append(given)
        return {"steps": []}

    monkeypatch.setattr(training, "theirs", patches)
    training.one_cell(day, cell, base_of(model, cell.shape, cell.storage), twin)
    assert len(patched) == 2
    assert vars(modeling_llama) == before


@pytest.mark.parametrize("storage", ["dense", "nf4"])
def test_trl_has_its_turns_on_the_same_weights(storage: str, tmp_path: Path) -> None:
    """With bitsandbytes' layers under it where ours are packed; and no turn meets another's adapters."""
    day = Day(Device("cpu"), tmp_path, 600.0, tiny=True, dtype=torch.float32)
    day.begin(600.0)
    cell = Cell("Llama-3.1-8B", storage, 1, 2048, 512, peers=True)
    model = make_model(cell.shape, day.device, day.tiny, day.dtype)
    twin = twin_of(model, storage)
    found = training.one_cell(day, cell, base_of(model, cell.shape, storage), twin)
    steps = {who: [turn["steps"] for turn in turns] for who, turns in found["turns"].items()}
    assert {who: len(turns) for who, turns in steps.items()} == {"lowrank": 2, "trl": 2}
    for ours, theirs in zip(*(turn for turns in steps.values() for turn in turns[:1])):
        assert theirs["loss"] == pytest.approx(ours["loss"][0], rel=2e-3)
    assert steps["trl"][0][0]["loss"] == steps["trl"][1][0]["loss"]
    assert not [name for name, _ in twin.named_parameters() if "lora" in name]


@pytest.mark.slow
def test_contenders_in_processes_of_their_own(tmp_path: Path) -> None:
    """As Unsloth would be, which needs a GPU."""
    day = Day(Device("cpu"), tmp_path, 600.0, tiny=True, dtype=torch.float32)
    found = in_processes(day, ["lowrank", "trl_packed"], ["--layers", "1", "--tokens", "256", "--dtype", "float32"])
    day.add("processes", found)
    assert all(each["tokens_per_second"] > 0 for each in found.values())
    assert "| lowrank | trl_packed |" in (tmp_path / "gpu_day.md").read_text()


def test_device_time_is_counted_once() -> None:
    """By torch's own events: an operator on the host carries the time of the kernel it launched, an annotation on the
    device that of all inside it; two streams overlap."""

    def event(name: str, start: float, end: float, device: DeviceType = DeviceType.CUDA, **named: Any) -> FunctionEvent:
        return FunctionEvent(
            id=0, name=name, thread=1, start_us=start, end_us=end, device_type=device, use_device="cuda", **named
        )

    launcher = event("aten::mm", 0, 5, DeviceType.CPU)
    launcher.append_kernel("gemm", 0, 100)
    events = EventList(
        [
            launcher,
            event("gemm", 10, 110),
            event("copy", 60, 130),
            event("norm", 150, 160),
            event("gemm", 165, 265),
            event("Optimizer.step", 10, 265, is_user_annotation=True),
        ],
        use_device="cuda",
    )
    found = profiling.on_device(events)
    assert found["busy_seconds"] == pytest.approx((120 + 10 + 100) / 1e6)
    assert [(each["name"], each["count"]) for each in found["top"]] == [("gemm", 2), ("copy", 1), ("norm", 1)]
    assert [each["seconds"] for each in found["top"]] == pytest.approx([2e-4, 7e-5, 1e-5])
    assert [(each["after"], each["before"]) for each in found["gaps"]] == [("copy", "norm"), ("norm", "gemm")]
    assert [each["seconds"] for each in found["gaps"]] == pytest.approx([2e-5, 5e-6])
    assert found["gap_seconds"] == pytest.approx(2.5e-5)


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
    assert sorted({each["cell"]["storage"] for each in beside_trl}) == ["dense", "nf4"]
    assert len(beside_trl) == 6
    for each in beside_trl:
        ours, theirs = (turns[0]["steps"][0]["loss"] for turns in each["turns"].values())
        assert ours[0] == pytest.approx(theirs, rel=2e-3), "a fresh adapter changes nothing: the same rows and weights"
