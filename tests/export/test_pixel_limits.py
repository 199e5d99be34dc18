"""Limits of pixels in the processor's files, as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from lowrank.export.writing.pixel_limits import write_pixel_limits


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ({"min_pixels": 3136, "max_pixels": 12845056}, (3136, 50_000)),  # Qwen2.5-VL's
        ({"size": {"longest_edge": 16777216, "shortest_edge": 65536}}, (50_000, 50_000)),  # Qwen3-VL's
        ({"size": {"longest_edge": 9000, "shortest_edge": 100}}, (1024, 9000)),
        ({"min_pixels": 100, "max_pixels": 9000, "size": {"longest_edge": 9000, "shortest_edge": 100}}, (1024, 9000)),
        ({}, (1024, 50_000)),
    ],
)
@pytest.mark.parametrize("kind", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_the_stricter_of_both_is_what_transformers_reads(
    tmp_path: Path, stored: dict[str, Any], read: tuple[int, int], kind: str
) -> None:
    settings = {"image_processor_type": kind, "patch_size": 14, **stored}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    write_pixel_limits(tmp_path, 50_000, 1024)
    size = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil").size
    assert (size["shortest_edge"], size["longest_edge"]) == read


def test_processors_without_such_limits_keep_their_files(tmp_path: Path) -> None:
    """`longest_edge` of Idefics3's is an edge."""
    text = json.dumps({"image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": 1456}})
    (tmp_path / "preprocessor_config.json").write_text(text)
    write_pixel_limits(tmp_path, 50_000, 1024)
    assert (tmp_path / "preprocessor_config.json").read_text() == text
