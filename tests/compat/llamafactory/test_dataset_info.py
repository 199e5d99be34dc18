"""Entries of dataset_info.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from lowrank.compat.llamafactory.dataset_info import read_info, remote_info, sources

FOLDER = Path("data")


def one(entry: dict[str, Any], stage: str = "sft") -> dict[str, Any]:
    (source,), problems = sources(["x"], {"x": entry}, FOLDER, stage)
    assert problems == []
    return source


def test_alpaca_by_default_and_no_columns_beyond_the_default_ones() -> None:
    assert one({"file_name": "a.json"}) == {
        "path": "data/a.json",
        "format": "alpaca",
        "columns": {"history": "", "system": "", "tools": ""},
    }


def test_mapped_columns_replace_all_defaults() -> None:
    entry = {"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "label"}}
    others = {"query": "", "history": "", "system": "", "tools": ""}
    assert one(entry)["columns"] == {"prompt": "q", "response": "a", **others}


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
        "columns": {
            "history": "",
            "system": "",
            "tools": "",
            "messages": "",
            "chosen": "chosen",
            "rejected": "rejected",
        },
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
        "tools": "",
        "messages": "",
        "kto_tag": "ok",
    }


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"file_name": "a", "colums": {}}, "unknown key 'colums'; did you mean 'columns'?"),
        ({"file_name": "a", "formatting": "alpacca"}, "formatting 'alpacca' is not known; did you mean 'alpaca'?"),
        ({"om_hub_url": "a/b"}, "its rows are a Modelers dataset; give file_name or hf_hub_url"),
        ({"script_url": "a"}, "its rows are a dataset script; give file_name or hf_hub_url"),
        ({}, "its rows are nowhere; give file_name or hf_hub_url"),
        ({"hf_hub_url": "a/b", "folder": "python"}, "`folder` of a hub dataset is not read"),
        ({"file_name": "a", "ranking": True}, "it holds preference pairs"),
        ({"file_name": 5}, "file_name: expected text, got a number (5)"),
        ({"file_name": "a", "columns": ["prompt"]}, "columns: expected an object, got a list"),
        ({"file_name": "a", "columns": {"prompt": 1}}, "columns.prompt: expected the name of a column, got a number"),
    ],
)
def test_entries_that_cannot_be_used(entry: dict[str, Any], problem: str) -> None:
    found, problems = sources(["x"], {"x": entry}, FOLDER, "sft")
    assert found == []
    assert len(problems) == 1
    assert problems[0].startswith(f"dataset 'x': {problem}")


def test_pictures_are_looked_for_in_the_folder_or_media_dir(tmp_path: Path) -> None:
    entry = {"file_name": "deep/rows.json", "formatting": "sharegpt", "columns": {"messages": "m", "images": "i"}}
    (found,), problems = sources(["x"], {"x": entry}, FOLDER, "sft")
    assert not problems
    assert (found["columns"]["images"], found["media_dir"]) == ("i", str(FOLDER))
    (found,), _ = sources(["x"], {"x": entry}, FOLDER, "sft", tmp_path)
    assert found["media_dir"] == str(tmp_path)
    _, problems = sources(["x"], {"x": {"file_name": "a", "columns": {"prompt": "p", "images": "i"}}}, FOLDER, "pt")
    assert problems == ["dataset 'x': it has images, and stage pt is on text alone so far; leave it out"]


def test_a_broken_file_says_where(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text('{"a": {\n  "file_name": }}')
    info, complaint = read_info(tmp_path)
    assert info == {}
    assert complaint is not None
    assert "dataset_info.json, line 2, column 16" in complaint


def test_a_deep_file_is_a_complaint(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("[" * 200_000, encoding="utf-8")
    assert read_info(tmp_path) == ({}, f"{tmp_path / 'dataset_info.json'}: nested too deep")


def test_keys_without_meaning_here_are_carried_to_the_doctor() -> None:
    entry = {"file_name": "a", "file_sha1": "abc", "load_from": "file", "columns": {"prompt": "q", "mood": "m"}}
    source = one({**entry, "subset": "zh", "split": "test"})
    assert source["unread_keys"] == ["file_sha1", "load_from", "columns.mood", "subset", "split"]
    assert "unread_keys" not in one({"hf_hub_url": "a/b", "subset": "zh", "split": "test"})


def test_a_local_folder_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (source,), problems = sources(["x"], {"x": {"file_name": "rows"}}, tmp_path, "sft")
    assert (source["split"], problems) == ("all", [])


def test_a_remote_dataset_info_is_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here from the hub's cache, as without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "datasets--me--demo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--me--demo" / "refs").mkdir()
    (tmp_path / "datasets--me--demo" / "refs" / "main").write_text("abc")
    (snapshot / "dataset_info.json").write_text('{"mine": {"file_name": "mine.json"}}')
    (snapshot / "mine.json").write_text('[{"instruction": "1?", "output": "1"}]')
    place, _ = remote_info("me/demo")
    assert place is not None
    (source,), problems = sources(["mine"], read_info(place)[0], place, "sft")
    assert not problems
    assert Path(source["path"]) == snapshot / "mine.json"
    assert remote_info("me/gone")[0] is None
