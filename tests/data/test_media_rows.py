"""Rows with pictures, films or sound are never trained as text in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowrank.data.chat.characters import CharacterRenderer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import examine

PLAIN = {"instruction": "What is it?", "output": "A cat."}
QUESTION = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


class TextOnly(CharacterRenderer):
    """As a model is that reads text alone."""

    def takes(self, kind: str) -> bool:
        return False


def left_out(tmp_path: Path, row: dict[str, Any], **settings: Any) -> list[str]:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    report = examine(DataConfig(train=(SourceConfig(path=str(path), **settings),)), renderer=TextOnly())
    return [finding.example for finding in report.datasets[0].dropped]


@pytest.mark.parametrize("row", [PLAIN, {"messages": QUESTION}, {"prompt": QUESTION[:1], "completion": QUESTION[1:]}])
@pytest.mark.parametrize(
    "column",
    [
        {"image": "cat.png"},
        {"images": ["cat.png"]},
        {"images": [], "image": {"bytes": "AA==", "path": None}},
        {"video": "cat.mp4"},
        {"videos": ["cat.mp4"]},
        {"audio": {"path": "cat.wav"}},
        {"audios": ["cat.wav"]},
    ],
    ids=lambda column: "+".join(column),
)
def test_columns(row: dict[str, Any], column: dict[str, Any], tmp_path: Path) -> None:
    (problem,) = left_out(tmp_path, {**row, **column})
    kind = list(column)[-1].removesuffix("s")
    never = {"image": "reads text only", "audio": "takes no sounds", "video": "takes no videos"}
    assert f"this base {never[kind]}" in problem
    assert f"column {list(column)[-1]!r} is filled" in problem


@pytest.mark.parametrize(
    "mark",
    [
        "<image>", "<video>", "<audio>", "<|image_pad|>", "<|video_pad|>", "<|AUDIO|>", "<|image|>", "<start_of_image>",
        "<image_soft_token>", "[IMG]",
    ],
)  # fmt: skip
def test_bare_placeholders(mark: str, tmp_path: Path) -> None:
    (problem,) = left_out(tmp_path, {**PLAIN, "instruction": f"{mark}What is it?"})
    never = {"<image>": "reads text only", "<audio>": "takes no sounds", "<video>": "takes no videos"}
    assert never.get(mark, f"{mark} stands in it") in problem
    assert left_out(tmp_path, {**PLAIN, "instruction": f"{mark}What is it?"}, replace={mark: ""}) == []


def test_a_placeholder_in_plain_text(tmp_path: Path) -> None:
    (problem,) = left_out(tmp_path, {"text": "See <|vision_start|><|image_pad|><|vision_end|> above."})
    assert "<|image_pad|> stands in it" in problem


@pytest.mark.parametrize("part", ["image", "image_url", "input_audio", "video"])
def test_parts_of_a_content(part: str, tmp_path: Path) -> None:
    content = [{"type": part, part: "cat"}, {"type": "text", "text": "What is it?"}]
    (problem,) = left_out(tmp_path, {"messages": [{"role": "user", "content": content}, QUESTION[1]]})
    expected = {"input_audio": "takes no sounds", "video": "takes no videos"}.get(part, "reads text only")
    assert expected in problem


@pytest.mark.parametrize(
    "text", ["<video src='a'></video>", "<video>a.mp4</video>", "[IMG]a.png[/IMG]", "<img src='a'>"]
)
def test_markup_is_text(text: str, tmp_path: Path) -> None:
    assert left_out(tmp_path, {**PLAIN, "output": text}) == []
