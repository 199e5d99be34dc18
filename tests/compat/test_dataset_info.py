"""Entries of dataset_info.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank.compat.dataset_info import read_info, sources

FOLDER = Path("data")


def one(entry: dict[str, Any], stage: str = "sft") -> dict[str, Any]:
    (source,), problems = sources(["x"], {"x": entry}, FOLDER, stage)
    assert problems == []
    return source


def test_alpaca_by_default_and_no_columns_beyond_the_default_ones() -> None:
    assert one({"file_name": "a.json"}) == {
        "path": "data/a.json",
        "format": "alpaca",
        "columns": {"history": "", "system": ""},
    }


def test_mapped_columns_replace_all_defaults() -> None:
    entry = {"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "label"}}
    assert one(entry)["columns"] == {"prompt": "q", "query": "", "response": "a", "history": "", "system": ""}


def test_a_chat_with_tags() -> None:
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "m", "tools": "t"}, "tags": tags}
    source = one(entry)
    assert source["format"] == "sharegpt"
    assert source["columns"] == {"messages": "m", "system": "", "tools": "t"}
    assert source["tags"] == tags


def test_openai_is_our_messages() -> None:
    assert one({"file_name": "a.json", "formatting": "openai"})["format"] == "messages"


def test_the_hub() -> None:
    entry = {"hf_hub_url": "a/b", "ms_hub_url": "c/d", "split": "train_sft", "subset": "en", "num_samples": 5}
    source = one(entry)
    assert (source["path"], source["split"], source["subset"], source["max_samples"]) == ("a/b", "train_sft", "en", 5)


def test_plain_text_for_pretraining() -> None:
    source = one({"file_name": "a.txt", "columns": {"prompt": "text"}}, stage="pt")
    assert source == {"path": "data/a.txt", "format": "text", "columns": {"text": "text"}}


def test_pairs_and_ratings() -> None:
    """Each prompt is played by the columns of its formatting alone."""
    assert one({"file_name": "a", "ranking": True}, stage="dpo") == {
        "path": "data/a",
        "format": "preference",
        "columns": {"history": "", "system": "", "messages": "", "chosen": "chosen", "rejected": "rejected"},
    }
    columns = {"messages": "conversations", "chosen": "good", "rejected": "bad"}
    chat = one({"file_name": "a", "ranking": True, "formatting": "sharegpt", "columns": columns}, stage="rm")
    assert chat["columns"] == columns | {"system": "", "tools": "", "prompt": ""}
    rated = one({"file_name": "a", "columns": {"prompt": "q", "response": "a", "kto_tag": "ok"}}, stage="kto")
    assert rated["format"] == "rated"
    assert rated["columns"] == {
        "prompt": "q",
        "query": "",
        "response": "a",
        "history": "",
        "system": "",
        "messages": "",
        "kto_tag": "ok",
    }


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"file_name": "a", "colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
        ({"file_name": "a", "formatting": "alpacca"}, "formatting 'alpacca' is not known; did you mean 'alpaca'?"),
        ({"ms_hub_url": "a/b"}, "its rows are a ModelScope dataset; give file_name or hf_hub_url"),
        ({"script_url": "a"}, "its rows are a dataset script; give file_name or hf_hub_url"),
        ({}, "its rows are nowhere; give file_name or hf_hub_url"),
        ({"hf_hub_url": "a/b", "folder": "python"}, "`folder` of a hub dataset is not read"),
        ({"file_name": "a", "ranking": True}, "it holds preference pairs"),
        ({"file_name": "a", "columns": {"images": "i"}}, "it has images, but only text is trained"),
    ],
)
def test_entries_that_cannot_be_used(entry: dict[str, Any], problem: str) -> None:
    found, problems = sources(["x"], {"x": entry}, FOLDER, "sft")
    assert found == []
    assert len(problems) == 1
    assert problems[0].startswith(f"dataset 'x': {problem}")


def test_a_broken_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"a": {\n  "file_name": }}')
    info, complaint = read_info(tmp_path)
    assert info == {}
    assert complaint is not None
    assert "dataset_info.json, line 2, column 16" in complaint
