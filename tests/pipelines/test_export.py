"""From a trained run to files that other programs run, compared with what was trained."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lowrank.models.tiny
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.config import RunConfig
from lowrank.errors import LowrankError, ModelError, OutputError
from lowrank.export import Needs
from lowrank.export.gguf.convert import convert
from lowrank.export.gguf.llama_cpp import run_child
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.export.writing import shards
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest, explain_export_disk_full, export_requests
from lowrank.pipelines.export_source import open_source
from lowrank.pipelines.train import train
from tests.checkpoint_folder import CHATML, save_checkpoint_folder, write_alpaca


def silent(text: str) -> None:
    """For notices that do not matter here."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two jobs, a few steps of each, on a tied bfloat16 base."""
    world = tmp_path_factory.mktemp("world")
    save_checkpoint_folder(world / "model", dtype=torch.bfloat16)
    given = {
        "model": {"path": str(world / "model"), "device": "cpu", "dtype": "float32"},
        "data": {"train": [str(write_alpaca(world / "train.json", 40))],
                 "eval": [str(write_alpaca(world / "eval.json", 8, start=100))], "batch_size": 8},
        "optimizer": {"learning_rate": 5e-2},
        "max_steps": 8,
        "output_dir": str(world / "run"),
        "jobs": [{"name": "small", "adapter": {"rank": 2}, "optimizer": {"learning_rate": 1e-4}},
                 {"name": "big", "adapter": {"rank": 8}}],
    }  # fmt: skip
    train(RunConfig(**given))
    return world / "run"


def export(run: Path, requests: list[ExportRequest], adapters: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    return export_targets(open_source(str(run), adapters=adapters, notify=silent), requests, notify=silent, **options)


def test_the_best_job_in_two_forms(run: Path, tmp_path: Path) -> None:
    described: list[str] = []
    found = open_source(str(run), notify=described.append)
    assert found.source.name == "big"
    assert "this is big" in described[0]
    received: list[tuple[str, int, int]] = []
    result = export_targets(
        found,
        export_requests([PeftExportConfig(), MergedExportConfig(max_shard_size="50KB")], tmp_path / "out"),
        notify=described.append,
        on_progress=lambda *progress: received.append(progress),
    )
    assert result["passed"]
    assert any("held-out rows" in text for text in described)
    assert any("merged in float32 from the original bfloat16 weights" in text for text in described)
    for name in ("peft", "merged"):
        report = json.loads((tmp_path / "out" / name / "export.json").read_text())
        assert report == result["targets"][name]
        (compared,) = report["comparisons"]
        assert compared["tokens"] == sum(len(str(number)) * 2 + 2 for number in range(100, 108))
        assert compared["gain_kept"] == pytest.approx(1, abs=0.02)
        assert compared["base_perplexity"] > compared["perplexity"]
        card = (tmp_path / "out" / name / "README.md").read_text()
        assert "lora of rank 8" in card
        assert "train.json" in card
        assert str(run.parent) not in card
        assert (tmp_path / "out" / name / "chat_template.jinja").read_text() == CHATML
    peft = result["targets"]["peft"]["comparisons"][0]
    assert (peft["mean_kl"], peft["top1_agreement"], peft["greedy_same"]) == (0, 1, peft["greedy_prompts"])
    assert 0 < result["targets"]["merged"]["comparisons"][0]["mean_kl"] < 1e-2
    written = [(done, total) for what, done, total in received if what == "writing merged"]
    assert written == sorted(written)
    assert written[-1][0] == written[-1][1]


@pytest.mark.slow
def test_what_was_exported_can_be_exported_again(run: Path, tmp_path: Path) -> None:
    """An adapter folder and a merged model are sources too; without the run's data general questions are asked."""
    export(
        run,
        [
            ExportRequest(PeftExportConfig(dtype="bfloat16"), tmp_path / "peft"),
            ExportRequest(MergedExportConfig(dtype="float32"), tmp_path / "m"),
        ],
    )
    again = export(tmp_path / "peft", [ExportRequest(MergedExportConfig(dtype="float32"), tmp_path / "from-peft")])
    assert again["passed"]
    assert "general questions" in again["targets"]["merged"]["compared_on"]
    copied = export(tmp_path / "m", [ExportRequest(MergedExportConfig(), tmp_path / "copy")])
    assert copied["targets"]["merged"]["comparisons"][0]["mean_kl"] == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "copy"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_of_a_run_are_combined(run: Path, tmp_path: Path) -> None:
    result = export(
        run,
        [ExportRequest(PeftExportConfig(), tmp_path / "both"), ExportRequest(MergedExportConfig(), tmp_path / "m")],
        ("small", "big"),
    )
    assert result["source"] == "small+big"
    assert result["passed"]
    assert {rank for rank, _ in load_adapter(tmp_path / "both").targets.values()} == {10}


def test_a_difference_is_found(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One norm weight of one layer off by a fifth."""
    write = shards.write_shards

    def wrong(merged: Any, layout: Any, dtype: Any, folder: Path, progress: Any) -> None:
        write(merged, layout, dtype, folder, progress)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.input_layernorm.weight"] *= 1.2
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("lowrank.export.targets.merged.write_shards", wrong)
    result = export(run, [ExportRequest(MergedExportConfig(dtype="float32"), tmp_path / "out")])
    assert not result["passed"]
    (compared,) = result["targets"]["merged"]["comparisons"]
    assert "mean KL is" in compared["problems"][0]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not json.loads((tmp_path / "out" / "export.json").read_text())["passed"]


def test_full_tuned_runs_are_copied(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    given = {"model": config["model"], "data": {"train": [str(run.parent / "train.json")]}, "tuning": "full",
             "max_steps": 1, "output_dir": str(tmp_path / "full")}  # fmt: skip
    train(RunConfig(**given))
    result = export(tmp_path / "full", [ExportRequest(MergedExportConfig(), tmp_path / "out")])
    assert result["passed"]
    assert "training rows" in result["targets"]["merged"]["compared_on"]
    with pytest.raises(ModelError, match="there is no adapter to write"):
        export(tmp_path / "full", [ExportRequest(PeftExportConfig(), tmp_path / "peft")])


# ---- bad input ----------------------------------------------------------------------------------------------------


def test_what_the_disk_did_not_take_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are synced by a thread while they are written, and a disk tells an error only once."""

    def refuse(number: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(shards, "_SYNCED_BYTES", 4)
    monkeypatch.setattr(shards.os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"), shards._to_disk(tmp_path / "file") as out:
        out.write(b"12345")


def test_the_disk_becomes_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = shards.ToDisk.write, []

    def full(out: shards.ToDisk, block: memoryview) -> None:
        calls.append(len(block))
        if len(calls) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(out, block)

    monkeypatch.setattr(shards.ToDisk, "write", full)
    with pytest.raises(OutputError, match=r"the disk became full while merged was written \(.* are needed\)"):
        export(run, [ExportRequest(MergedExportConfig(), tmp_path / "out")], verify=False)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == []


def _by_safetensors() -> None:
    """Its words on a disk that was full; it renames what it wrote, so no device can be its target."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _by_a_child() -> None:
    """Quantizing, which llama.cpp's kernels do in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        convert(Path(lowrank.models.tiny.__file__).parent, Path(folder, "tiny.gguf"), "f16")
        tensors = gguf.GGUFReader(Path(folder, "tiny.gguf")).tensors
        types = {tensor.name: "F16" if len(tensor.shape) > 1 else None for tensor in tensors}
        request = {"source": str(Path(folder, "tiny.gguf")), "target": "/dev/full", "types": types, "importance": None,
                   "threads": 1, "library": None, "file_type": 1}  # fmt: skip
        run_child("quantize_child", request, "quantizing tiny.gguf")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="a disk that is always full")
@pytest.mark.parametrize("write", [_by_safetensors, _by_a_child])
def test_every_writer_says_that_the_disk_is_full(write: Callable[[], None], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the disk became full while merged was written"):  # noqa: SIM117
        with explain_export_disk_full(ExportRequest(MergedExportConfig(), tmp_path / "out"), Needs(1, 1)):
            write()


def test_places_are_checked_first(run: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x")
    inside = run.parent / "model" / "merged"
    with pytest.raises(OutputError) as refused:
        export(
            run, [ExportRequest(PeftExportConfig(), tmp_path / "taken"), ExportRequest(MergedExportConfig(), inside)]
        )
    assert "taken is not empty" in str(refused.value)
    assert f"{inside} is inside of what is exported" in str(refused.value)
    with pytest.raises(OutputError, match="inside of what is exported"):
        export(run, [ExportRequest(MergedExportConfig(), run / "big" / "merged")])
    assert not inside.exists()


@pytest.mark.parametrize(
    ("what", "value", "described"),
    [("lowrank.pipelines.export_checks.shutil.disk_usage", 1000, "of disk are needed"),
     ("lowrank.pipelines.export_checks.psutil.virtual_memory", 1000, "verification loads the model and needs")],
)  # fmt: skip
def test_room_is_checked_first(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, value: int, described: str
) -> None:
    class Little:
        free = available = value

    monkeypatch.setattr(what, lambda *args: Little)
    with pytest.raises(OutputError, match=described):
        export(run, [ExportRequest(MergedExportConfig(), tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def _cut(run: Path, adapter: Path) -> None:
    file = run.parent / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _other_base(run: Path, adapter: Path) -> None:
    save_checkpoint_folder(run.parent / "model", hidden_size=48)


@pytest.mark.parametrize(
    ("break_it", "described"), [(_cut, "it ends at byte"), (_other_base, r"\(8, 32\) in the adapter")]
)
def test_damage_is_found_before_any_work(
    run: Path, tmp_path: Path, break_it: Callable[[Path, Path], None], described: str
) -> None:
    model = run.parent / "model"
    kept = {path.name: path.read_bytes() for path in model.iterdir()}
    try:
        break_it(run, run / "big")
        with pytest.raises(LowrankError, match=described):
            export(run, [ExportRequest(MergedExportConfig(), tmp_path / "out")])
    finally:
        for name, content in kept.items():
            (model / name).write_bytes(content)
    assert list(tmp_path.iterdir()) == []


def test_names_are_checked(run: Path) -> None:
    with pytest.raises(ModelError, match=r"no job 'bigg'; did you mean 'big'\?"):
        open_source(str(run), adapters=["bigg"], notify=silent)
    with pytest.raises(ModelError, match="no such folder here"):
        open_source(str(run / "nothing"), notify=silent)
