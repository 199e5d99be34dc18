"""What is written of a model that sees is asked about a picture: a tower that is not the one that was trained fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.export.quantize.packed import PackedTarget
from lowrank.export.targets.awq import AWQExportConfig
from lowrank.export.targets.compressed_tensors import CompressedTensorsExportConfig
from lowrank.export.targets.gptq import GPTQExportConfig
from lowrank.export.targets.merged import MergedExportConfig, MergedTarget
from lowrank.export.targets.merged_4bit import Merged4bitExportConfig
from lowrank.export.targets.peft import PeftExportConfig, PeftTarget
from lowrank.export.writing.pixel_limits import write_pixel_limits
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from lowrank.pipelines.export_source import ResolvedSource, open_source
from tests.checkpoints.test_peft_layout import random_adapter
from tests.tiny_vision_models import VISION_MODELS, make_vision_model, save_folder

EVERYWHERE = LoraConfig(rank=2, freeze_vision_tower=False, freeze_multi_modal_projector=False)


def trained(folder: Path, family: str, config: LoraConfig = EVERYWHERE) -> ResolvedSource:
    """A tiny base that sees, with a random adapter on all of its parts."""

    def make() -> Any:
        model = make_vision_model(family, torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:  # fresh ones hardly tell one picture from another
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
        return model

    base = save_folder(folder, VISION_MODELS[family], make)
    found = open_source(str(base), notify=lambda text: None)
    with quiet_transformers():
        model = transformers.AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32)
    return replace(found, source=replace(found.source, adapter=random_adapter(model, config)))


def exported(found: ResolvedSource, config: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured of texts, and of a picture."""
    reported = export_targets(found, [ExportRequest(config, folder)], notify=lambda text: None)
    (target,) = reported["targets"].values()
    text, picture = target["comparisons"]
    assert picture["name"] == f"{text['name']}, asked about a picture"
    assert target["passed"] == (text["passed"] and picture["passed"])
    return text, picture


def slow(family: str, config: Any) -> Any:
    return pytest.param(family, config, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2_5_vl", MergedExportConfig(dtype="float32")),
        slow("gemma3", MergedExportConfig(dtype="float32")),
        slow("paligemma", MergedExportConfig(dtype="float32")),
        slow("idefics3", MergedExportConfig(dtype="float32")),
        ("qwen3_vl", PeftExportConfig()),
        ("llava", GPTQExportConfig(bits=8, calibrate=False)),
        slow("qwen2_5_vl", AWQExportConfig(calibrate=False)),
        slow("qwen2_5_vl", CompressedTensorsExportConfig(bits=8, calibrate=False)),
        slow("llava", Merged4bitExportConfig(calibrate=False)),
    ],
)
def test_every_form_is_asked_about_a_picture(family: str, config: Any, tmp_path: Path) -> None:
    found = trained(tmp_path / "base", family)
    text, picture = exported(found, config, tmp_path / "out")
    if config.type in ("awq", "merged_4bit"):  # random weights bear rounding to 4 bits badly
        assert picture["mean_kl"] < 2 * text["mean_kl"]
    else:
        assert text["passed"], text["problems"]
        assert picture["passed"], picture["problems"]
    assert picture["tokens"] > 1
    assert f"{text['name']}, asked about a picture" in (tmp_path / "out" / "README.md").read_text()


def damaged(kind: Any, patch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let a target write, and then `damage` what is there."""
    write = kind.write

    def writing(target: Any, source: Any, folder: Path, progress: Any) -> Any:
        notes = write(target, source, folder, progress)
        damage(folder)
        return notes

    patch.setattr(kind, "write", writing)


def changed(name: str, part: str, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """`change` of each tensor of a file whose name has `part` in it."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        assert any(part in each for each in tensors), sorted(tensors)
        save_file(
            {each: change(each, value) if part in each else value for each, value in tensors.items()},
            folder / name, metadata={"format": "pt"},
        )  # fmt: skip

    return damage


def test_a_damaged_projector_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path / "base", "llava")
    damaged(
        MergedTarget, monkeypatch,
        changed("model.safetensors", "multi_modal_projector.linear_2.weight", lambda _, value: value * 0.9),
    )  # fmt: skip
    text, picture = exported(found, MergedExportConfig(dtype="float32"), tmp_path / "out")
    assert text["passed"]
    assert not picture["passed"]
    assert any("mean KL" in each for each in picture["problems"])


def test_a_tower_without_its_update_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path / "base", "qwen2_5_vl")
    before = load_file(found.source.base / "model.safetensors")
    damaged(MergedTarget, monkeypatch, changed("model.safetensors", "visual", lambda name, _: before[name]))
    text, picture = exported(found, MergedExportConfig(dtype="float32"), tmp_path / "out")
    assert text["passed"]
    assert not picture["passed"]


@pytest.mark.parametrize("share", [pytest.param(1.0, marks=pytest.mark.slow), 0.05])
def test_so_does_one_that_answers_hardly_depend_on(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 16 bits an answer may move by as much as without the update: what the tower says is compared by itself."""
    found = trained(tmp_path / "base", "llava")
    adapter = found.source.adapter
    assert adapter is not None
    tensors = {name: value * (share if "lora_B" in name else 1) for name, value in adapter.tensors.items()}
    found = replace(found, source=replace(found.source, adapter=replace(adapter, tensors=tensors)))
    _, picture = exported(found, MergedExportConfig(dtype="bfloat16"), tmp_path / "whole")
    assert picture["passed"], picture["problems"]
    before = load_file(found.source.base / "model.safetensors")
    damaged(MergedTarget, monkeypatch, changed("model.safetensors", "vision_tower", lambda name, _: before[name]))
    _, picture = exported(found, MergedExportConfig(dtype="bfloat16"), tmp_path / "out")
    assert not picture["passed"]
    assert picture["mean_kl"] < picture["tolerance"]["mean_kl"]
    assert ("off by" if share == 1 else "of what training changed") in picture["problems"][0]


def test_an_adapter_whose_tower_is_lost_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path / "base", "qwen2_5_vl")
    damaged(
        PeftTarget,
        monkeypatch,
        changed("adapter_model.safetensors", "visual", lambda _, value: torch.zeros_like(value)),
    )
    text, picture = exported(found, PeftExportConfig(), tmp_path / "out")
    assert text["passed"]
    assert not picture["passed"]


def test_a_packed_model_that_is_blind_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(tmp_path / "base", "llava")
    damaged(
        PackedTarget, monkeypatch,
        changed("model.safetensors", "multi_modal_projector.linear_2.weight", lambda _, value: value * 0),
    )  # fmt: skip
    request = ExportRequest(GPTQExportConfig(bits=8, calibrate=False), tmp_path / "out")
    reported = export_targets(found, [request], notify=lambda text: None)["targets"]["gptq"]
    assert not reported["passed"]
    assert [each["passed"] for each in reported["comparisons"]] == [True]
    assert "it makes the same of different pictures" in reported["failed"]["gptq"]["message"]


def test_a_processor_that_makes_other_pictures_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures become another number of tokens where it is served."""
    found = trained(tmp_path / "base", "qwen2_5_vl")

    def smaller(folder: Path) -> None:
        write_pixel_limits(folder, 16 * 16, 8 * 8)

    damaged(MergedTarget, monkeypatch, smaller)
    _, picture = exported(found, MergedExportConfig(dtype="float32"), tmp_path / "out")
    assert "tokens stand for a picture of" in picture["problems"][0]
