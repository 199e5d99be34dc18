"""Conversations about pictures, as LLaMA-Factory's `mllm_demo.json` writes them; that file where it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media_rows import write_conversations

_SIZES = ((300, 168), (168, 240), (300, 199))
_TURNS = (
    ((0, 0), (("<image>Who are they?", "They're two players."), ("What are they doing?<image>", "They celebrate."))),
    ((1,), (("<image>Who is he?", "A footballer."), ("Why is he on the ground?", "He slides on his knees."))),
    ((2,), (("<image>Please describe this image", "An astronaut speaks."), ("What has he done?", "He flew."))),
    ((0, 0), (("<image>他们是谁？", "他们是球员。"), ("他们在做什么？<image>", "他们在庆祝。"))),
    ((1,), (("<image>他是谁？", "他是球员。"), ("他为什么在地上？", "他在庆祝。"))),
    ((2,), (("<image>请描述这张图片", "宇航员正在讲话。"), ("他取得过哪些成就？", "他进入了太空。"))),
)


def write_picture_rows(folder: Path) -> Path:
    """The file of six conversations in `folder`, with three pictures beside it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for number, (width, height) in enumerate(_SIZES):
        value = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(value).save(folder / "pictures" / f"{number}.jpg")
    talks = [([f"pictures/{number}.jpg" for number in numbers], turns) for numbers, turns in _TURNS]
    return write_conversations(folder / "mllm.json", "images", talks)


def real_or_made(request: pytest.FixtureRequest, folder: Path) -> Path:
    """LLaMA-Factory's file where --shared-data says where it is, else ours."""
    shared = request.config.getoption("--shared-data")
    return Path(shared).resolve() / "mllm_demo.json" if shared else write_picture_rows(folder)
