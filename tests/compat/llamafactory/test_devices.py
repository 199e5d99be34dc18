"""On several devices LLaMA-Factory's step grows; a file means the same step here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.compat.llamafactory.convert import convert
from lowrank.compat.llamafactory.devices import devices_of, spread


def test_as_its_launcher_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_of({}) == 1
    assert devices_of({"FORCE_TORCHRUN": "1"}) == 1
    assert devices_of({"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "4"}) == 4
    assert devices_of({"NPROC_PER_NODE": "4"}) == 1, "it starts nothing on one device"
    started = {"RANK": "3", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert devices_of(started) == 16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert devices_of({}) == 8
    assert devices_of({"NPROC_PER_NODE": "2"}) == 2


def test_the_step_is_as_large_as_there() -> None:
    assert spread(4, {}) == (4, 1, None)
    samples, devices, text = spread(4, {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "6"})
    assert (samples, devices) == (24, 4)
    assert text is not None
    assert "4 x 6 = 24" in text
    assert "2 of them are not used" in text
    samples, devices, text = spread(4, {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (samples, devices) == (8, 1), "torchrun has started them already"


def test_a_file_says_it_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 8
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    file: dict[str, Any] = {
        "model_name_or_path": "lowrank/tiny", "stage": "sft", "do_train": True, "finetuning_type": "lora",
        "dataset": "rows", "dataset_dir": str(tmp_path), "template": "qwen", "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    alone = convert(file, folder=tmp_path)
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    several = convert(file, folder=tmp_path)
    assert several.config == {**alone.config, "devices": 2, "data": {**alone.config["data"], "batch_size": 4}}
    (more,) = [text for text in several.warnings if text not in alone.warnings]
    assert more.startswith("on the 2 devices that LLaMA-Factory would use here its step holds 2 x 2 = 4 samples")
