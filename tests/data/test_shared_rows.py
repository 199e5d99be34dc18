"""Jobs share what was read where it is the same for them, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank.data.config import DataConfig
from lowrank.data.prepare import Prepared, key_of_rows, prepare
from lowrank.models.config import ModelConfig
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation
from lowrank.segments import Segment

TOKENIZER: Any = load_tokenizer(ModelConfig(path="lowrank/tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    for name in ("one", "two"):
        rows = [{"instruction": f"{name} {n}", "output": "word " * (1 + n % 5)} for n in range(24)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def config(folder: Path, **settings: Any) -> DataConfig:
    files = settings.pop("files", ("one",))
    sources = [{"path": str(folder / f"{name}.jsonl"), **settings.pop("source", {})} for name in files]
    return DataConfig.model_validate({"batch_size": 4, **settings, "train": sources})


def read(data: DataConfig, seed: int) -> Prepared:
    return prepare(data, tokenizer=TOKENIZER, record=Conversation, seed=seed)


def tokens(segments: list[Segment]) -> list[list[int]]:
    return [segment.token_L.tolist() for segment in segments]


def steps(prepared: Prepared) -> list[list[list[int]]]:
    return [tokens(prepared.train.next_step()) for _ in range(8)]


@pytest.mark.parametrize(
    ("settings", "other", "seed"),
    [
        ({}, {}, 7),
        ({}, {"batch_size": 3, "shuffle": False}, 1),
        ({}, {"batch_tokens": 60}, 7),
        ({"files": ("one", "two")}, {}, 7),
        ({"validation_split": 0.2}, {"batch_size": 5}, 1),
        ({"max_samples": 9}, {"batch_size": 2}, 1),
    ],
)
def test_what_is_shared_is_what_each_would_read(
    folder: Path, settings: dict[str, Any], other: dict[str, Any], seed: int
) -> None:
    first, second = config(folder, **settings), config(folder, **{**settings, **other})
    assert key_of_rows(first, 1) == key_of_rows(second, seed)
    shared, alone = read(first, 1).for_another(second, seed), read(second, seed)
    assert steps(shared) == steps(alone)
    assert tokens(shared.eval) == tokens(alone.eval)
    assert shared.report == alone.report


@pytest.mark.parametrize(
    ("settings", "other", "seed"),
    [
        ({"max_samples": 9}, {}, 7),
        ({"source": {"max_samples": 9}}, {}, 7),
        ({"validation_split": 0.2}, {}, 7),
        ({"files": ("one", "two"), "mix": "interleave_once"}, {}, 7),
        ({}, {"chat_template": "alpaca"}, 1),
        ({}, {"train_on_prompt": True}, 1),
        ({}, {"default_system": "Be brief."}, 1),
    ],
)
def test_what_reads_otherwise_is_read_again(
    folder: Path, settings: dict[str, Any], other: dict[str, Any], seed: int
) -> None:
    first, second = config(folder, **dict(settings)), config(folder, **{**settings, **other})
    one, another = read(first, 1), read(second, seed)
    content = [
        [np.stack([each.token_L, each.weight_L]).tolist() for (each,) in own.train.samples] for own in (one, another)
    ]
    assert content[0] != content[1]
    assert key_of_rows(first, 1) != key_of_rows(second, seed)
