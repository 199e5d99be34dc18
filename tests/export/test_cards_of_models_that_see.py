"""Model cards of models that see: their Python asks about a picture, and what vLLM leaves of an adapter is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.peft_config import describe_base
from lowrank.checkpoints.peft_layout import save_adapter
from lowrank.export.targets.gptq import GPTQExportConfig
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.export.targets.peft import PeftExportConfig
from lowrank.pipelines.export import export_targets
from lowrank.pipelines.export_checks import ExportRequest
from tests.export.test_pictures_compared import EVERYWHERE, trained
from tests.tiny_vision_models import make_vision_model


def card_of(config: Any, adapter: LoraConfig, folder: Path, family: str = "llava") -> str:
    found = trained(folder / "base", family, adapter)
    export_targets(found, [ExportRequest(config, folder / "out")], verify=False, notify=lambda text: None)
    return (folder / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("config", [MergedExportConfig(), PeftExportConfig()], ids=["merged", "peft"])
def test_its_python_asks_about_a_picture(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_of(config, EVERYWHERE, tmp_path)
    assert "pipeline_tag: image-text-to-text" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("path/of/this/folder", str(tmp_path / "out")).replace(
        "path/of/the/base", str(tmp_path / "base")
    )
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "What is this?" in capsys.readouterr().out


@pytest.mark.parametrize("everywhere", [True, False])
def test_what_vllm_leaves_of_an_adapter_is_said(everywhere: bool, tmp_path: Path) -> None:
    """In the card of an export, and in that of the folder that training writes."""
    config = EVERYWHERE if everywhere else LoraConfig(rank=2)
    found = trained(tmp_path / "base", "llava", config)
    adapter = found.source.adapter
    assert adapter is not None
    described = describe_base(make_vision_model("llava"), "base")
    number = len(described.tower_modules & set(adapter.targets))
    assert (number > 0) == everywhere
    save_adapter(tmp_path / "saved", adapter, described)
    request = ExportRequest(PeftExportConfig(), tmp_path / "out")
    export_targets(found, [request], verify=False, notify=lambda text: None)
    for folder in ("saved", "out"):
        card = (tmp_path / folder / "README.md").read_text("utf-8")
        if everywhere:
            assert f"it leaves {number} of this one's {len(adapter.targets)} layers out" in card
            assert "--to merged" in card
        else:
            assert "which is where all of this one is" in card
        assert "AutoProcessor" in card


def test_servers_are_given_pictures_in_their_way(tmp_path: Path) -> None:
    card = card_of(GPTQExportConfig(bits=8, calibrate=False), LoraConfig(rank=2), tmp_path)
    assert "vllm serve" in card
    assert "`image_url` parts" in card
