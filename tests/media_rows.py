"""What tests of pictures, videos and sounds share: files of conversations about them, and bases that take them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import prepare
from lowrank.media.processor import processor_of
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.loading.pretrained import load
from lowrank.models.loading.tokenizer import load_tokenizer
from lowrank.records import Conversation
from lowrank.segments import Segment

_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def write_conversations(path: Path, column: str, talks: Iterable[tuple[Any, Iterable[tuple[str, str]]]]) -> Path:
    """A file as LLaMA-Factory writes them: of each talk what its column of media holds, and questions with answers."""
    rows = [
        {
            "messages": [
                {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)
            ],
            column: media,
        }
        for media, turns in talks
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def write_dataset_info(folder: Path, name: str, file: str, column: str) -> None:
    """LLaMA-Factory's entry for such a file."""
    columns = {"messages": "messages", column: column}
    entry = {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": _TAGS}
    (folder / "dataset_info.json").write_text(json.dumps({name: entry}))


def packed_base(folder: Path, dtype: str, kinds: Sequence[str]) -> Any:
    """(the base, its tokenizer) of a checkpoint, which takes these kinds of media packed."""
    config = ModelConfig(path=str(folder), dtype=dtype, device="cpu")
    tokenizer = load_tokenizer(config)
    base = load(config, tokenizer=tokenizer, notify=lambda _: None)
    processor = processor_of(tokenizer)
    assert processor is not None
    assert give_media_encoder(base, processor, kinds=kinds) is None
    assert base.layout == "packed"
    return base, tokenizer


def segments_in(tokenizer: Any, *paths: Path, **settings: Any) -> list[Segment]:
    """All segments of these files, in their order."""
    sources = tuple(SourceConfig(path=str(path)) for path in paths)
    config = DataConfig(train=sources, shuffle=False, **{"max_length": 2048, **settings})
    found = prepare(config, tokenizer=tokenizer, record=Conversation, seed=0)
    return [segment for sample in found.train.samples for segment in sample]
