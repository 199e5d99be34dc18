"""A model that sees, and conversations about pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.picture_rows import write_picture_rows
from tests.tiny_vision_models import save_vision_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_vision_folder(folder / "model", "qwen2_5_vl")
    write_picture_rows(folder)
    return folder
