"""Tokenized rows on disk: written by one run, read by the next, in the layout of `datasets`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from lowrank.data.config import DataConfig
from lowrank.data.prepare import prepare
from lowrank.errors import DataError
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.records import Conversation, Preference, Rated
from lowrank.segments import Segment

TOKENIZER = load_tokenizer(ModelConfig(path="lowrank/tiny"))


def run(record: type = Conversation, **settings: Any) -> Any:
    config = DataConfig.model_validate({"batch_size": 4, "shuffle": False, **settings})
    return prepare(config, tokenizer=TOKENIZER, record=record, seed=0)


def rows(folder: Path) -> str:
    path = folder / "rows.json"
    path.write_text(json.dumps([{"instruction": f"Say {n}.", "input": "", "output": f"{n}!"} for n in range(8)]))
    return str(path)


def same(ours: list[Segment], theirs: list[Segment]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert (one.pair, one.role) == (other.pair, other.role)
        np.testing.assert_array_equal(one.token_L, other.token_L)
        np.testing.assert_array_equal(one.weight_L, other.weight_L)


def test_the_next_run_reads_what_the_first_wrote(tmp_path: Path) -> None:
    settings = {"tokenized_path": str(tmp_path / "kept"), "validation_split": 2}
    first = run(train=rows(tmp_path), **settings)
    (tmp_path / "rows.json").unlink()
    again = run(train=str(tmp_path / "rows.json"), **settings)
    same(again.train.next_step(), first.train.next_step())
    same(again.eval, first.eval)
    assert (again.report.train_samples, again.report.eval_samples) == (6, 2)
    assert any("tokenized before" in notice for notice in again.report.notices)


def test_the_layout_is_that_of_datasets(tmp_path: Path) -> None:
    """Read and written by the library itself, with LLaMA-Factory's columns."""
    segments = run(train=rows(tmp_path), tokenized_path=str(tmp_path / "kept")).train.next_step()
    theirs = datasets.load_from_disk(str(tmp_path / "kept"))["train"]
    assert theirs.column_names == ["input_ids", "attention_mask", "labels"]
    assert theirs[0]["input_ids"] == segments[0].token_L.tolist()
    learned = [label for label in theirs[0]["labels"] if label != -100]
    assert TOKENIZER.decode(learned).startswith("0!")
    made = datasets.DatasetDict({"train": theirs.map(lambda row: {**row, "images": None})})
    made.save_to_disk(str(tmp_path / "made"))
    same(run(train="gone", tokenized_path=str(tmp_path / "made")).train.next_step(), segments)


def test_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([{"prompt": f"Q{n}", "chosen": "yes", "rejected": "no"} for n in range(4)]))
    settings = {"tokenized_path": str(tmp_path / "kept"), "batch_size": 2}
    first = run(Preference, train=str(path), **settings)
    same(run(Preference, train=str(path), **settings).train.next_step(), first.train.next_step())
    with pytest.raises(DataError, match="has no input_ids, so it was tokenized for another objective"):
        run(Conversation, train=str(path), **settings)
    with pytest.raises(DataError, match="rated answers are not kept"):
        run(Rated, train=str(path), **settings)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [1, 2, 99_999_999], "labels": [-100, 2, 3]}, "token 99999999, and the tokenizer has"),
        ({"input_ids": [1, 2], "labels": [-100]}, "have 2 and 1 numbers"),
        ({"input_ids": [1] * 3000, "labels": [1] * 3000}, "3000 tokens, more than data.max_length 2048"),
    ],
)
def test_rows_that_cannot_be(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row])}).save_to_disk(str(tmp_path / "kept"))
    with pytest.raises(DataError, match=problem):
        run(train="gone", tokenized_path=str(tmp_path / "kept"))
