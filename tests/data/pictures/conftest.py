"""A folder of pictures, and the tokenizer of a model that sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from tests.data.pictures.rows import noise
from tests.tiny_vision_models import save_vision_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(ModelConfig(path=str(save_vision_folder(tmp_path_factory.mktemp("m") / "m", "qwen2_5_vl"))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    for number in range(3):
        noise((40 + 8 * number, 24), seed=number).save(tmp_path / "data" / "pictures" / f"{number}.png")
    return tmp_path / "data"
