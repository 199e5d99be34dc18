"""Which files of a folder are read: saved folders, cards, subsets, splits by name; what is refused, with the choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from lowrank.data.config import SourceConfig
from lowrank.data.sources.rows import read_rows
from lowrank.errors import DataError


def read(path: Path, notes: list[str] | None = None, **settings: Any) -> list[Any]:
    """The value `of` of every row."""
    note = (notes if notes is not None else []).append
    return [row.values["of"] for row in read_rows(SourceConfig(path=str(path), **settings), seed=0, note=note)]


def put(folder: Path, **rows: int) -> Path:
    """A jsonl file of so many rows for each name (`a__b` is b in the folder a)."""
    for name, count in rows.items():
        path = folder / (name.replace("__", "/") + ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"of": f"{name} {n}"}) + "\n" for n in range(count)), encoding="utf-8")
    return folder


def test_leftovers_of_datasets_are_no_rows(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    folder = str(tmp_path / "saved")
    datasets.Dataset.from_list([{"of": f"row {n}"} for n in range(6)]).save_to_disk(folder)
    loaded = datasets.load_from_disk(folder)
    loaded.map(lambda row: {"of": row["of"].upper()})
    loaded.filter(lambda row: row["of"] != "row 3")
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 2
    expected = [f"row {n}" for n in range(6)]
    assert read(tmp_path / "saved") == expected
    assert read(tmp_path) == expected  # from the folder above as well
    (tmp_path / "saved" / "state.json").unlink()
    assert read(tmp_path / "saved") == expected  # by the names alone


def test_a_saved_folder_is_whole_or_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}', encoding="utf-8")
    with pytest.raises(DataError, match="outside of it"):
        read(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}', encoding="utf-8")
    with pytest.raises(DataError, match=r"names x\.arrow, which is not there"):
        read(tmp_path)
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="was the folder saved whole"):
        read(tmp_path)


def test_splits_of_a_saved_dict(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    both: Any = {name: datasets.Dataset.from_list([{"of": name}]) for name in ("train", "held_out")}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "both"))
    assert read(tmp_path / "both") == ["train"]
    assert read(tmp_path / "both", split="held_out") == ["held_out"]
    assert read(tmp_path / "both", split="all") == ["train", "held_out"]
    with pytest.raises(DataError, match="there is none; the splits are train, held_out"):
        read(tmp_path / "both", split="test")


def test_splits_of_any_name(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train_gen", "train_prefs", "train_sft", "test_sft"):
        table = pa.Table.from_pylist([{"of": name}])
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    assert read(tmp_path, split="train_prefs") == ["train_prefs"]
    with pytest.raises(DataError, match="several could be meant; the splits are train_gen, train_prefs, train_sft;"):
        read(tmp_path)
    notes: list[str] = []
    assert read(tmp_path, notes, split="test") == ["test_sft"]
    assert "the split 'test_sft' is taken, the only one like 'test'" in notes
    assert len(read(tmp_path, split="all")) == 4


def test_files_that_say_of_no_split_belong_to_train(tmp_path: Path) -> None:
    put(tmp_path, train=2, test=1, part2=3)
    notes: list[str] = []
    assert len(read(tmp_path, notes)) == 5
    assert notes == [
        "taken with the split train, since their names say of no split: part2.jsonl",
        f"left out in {tmp_path.name}: test.jsonl",
    ]
    assert read(tmp_path, split="test") == ["test 0"]
    assert len(read(tmp_path, split="all")) == 6
    assert len(read(tmp_path, split="part2")) == 3


def test_subsets_are_folders(tmp_path: Path) -> None:
    put(tmp_path, en__train=4, en__test=1, zh__train=3, zh__test=1)
    assert len(read(tmp_path, subset="zh")) == 3
    assert len(read(tmp_path, subset="zh", split="test")) == 1
    with pytest.raises(DataError, match=r"no subset 'zn'; there are en, zh$"):
        read(tmp_path, subset="zn")
    with pytest.raises(DataError, match="this is one file, which has no splits or subsets"):
        read(tmp_path / "en" / "train.jsonl", subset="en")


def test_the_card_names_the_files(tmp_path: Path) -> None:
    put(tmp_path, part_a=5, part_b=2, more__x=1, more__y=1)
    card = tmp_path / "README.md"
    card.write_text(
        "---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part_a.jsonl\n"
        "  - split: test\n    path: [part_b.jsonl]\n- config_name: more\n  data_files: more/*.jsonl\n---\n# Card\n",
        encoding="utf-8",
    )
    assert len(read(tmp_path)) == 5
    assert len(read(tmp_path, split="test")) == 2
    assert len(read(tmp_path, subset="more")) == 2
    with pytest.raises(DataError, match="no subset 'other'; there are default, more"):
        read(tmp_path, subset="other")
    with pytest.raises(DataError, match="there is none; the splits are test, train"):
        read(tmp_path, split="validation")
    card.write_text("---\nconfigs:\n- config_name: a\n  data_files: ../x.jsonl\n---\n", encoding="utf-8")
    with pytest.raises(DataError, match="outside of the folder"):
        read(tmp_path)
    card.write_text("---\na: &a [1]\nconfigs: [*a, *a]\n---\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"README\.md: broken YAML at its head \(an alias"):
        read(tmp_path)
    card.write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert len(read(tmp_path)) == 9


def test_two_subsets_without_a_default_are_a_question(tmp_path: Path) -> None:
    put(tmp_path, a=1, b=2)
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in "ab"]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n", encoding="utf-8")
    with pytest.raises(DataError, match="its card has the subsets a, b; set `subset` to one"):
        read(tmp_path)
    assert len(read(tmp_path, subset="b")) == 2


def test_a_folder_in_a_circle_ends(tmp_path: Path) -> None:
    put(tmp_path, a=1)
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    assert read(tmp_path) == ["a 0"]


def test_different_things_of_one_split_are_a_question(tmp_path: Path) -> None:
    folder = put(tmp_path / "two", train_sft=2, train_prefs=3, test_sft=1, test_prefs=1)
    with pytest.raises(
        DataError, match=r"train_prefs.jsonl, train_sft.jsonl.*`split` to one of train_prefs, train_sft"
    ):
        read(folder)
    assert len(read(folder, split="train_sft")) == 2
    assert len(read(folder, split="train_prefs")) == 3
    with pytest.raises(DataError, match="test_prefs"):
        read(folder, split="test")
    assert len(read(folder, split="all")) == 7
    other = put(tmp_path / "before", sft_train=2, prefs_train=3)
    with pytest.raises(DataError, match=r"prefs_train.jsonl, sft_train.jsonl"):
        read(other)
    parts = put(tmp_path / "parts", train_1=1, train_2=1, train_part_3=1, train__sft=1, train__prefs=1)
    assert len(read(parts)) == 5
