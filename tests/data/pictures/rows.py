"""Pictures of noise, and rows of conversations about them, read by the tokenizer of a model that sees."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.prepare import Prepared, prepare
from lowrank.media.decoding import examine
from lowrank.records import Conversation


def noise(size: tuple[int, int] = (40, 24), mode: str = "RGB", seed: int = 0) -> Image.Image:
    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(value).convert(mode)


def as_bytes(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tokenizer: Any, folder: Path, *rows: dict[str, Any], record: type = Conversation, **settings: Any) -> Prepared:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    media_dir = settings.pop("media_dir", None)
    source = SourceConfig(path=str(path), media_dir=media_dir)
    config = DataConfig(train=(source,), shuffle=False, **settings)
    return prepare(config, tokenizer=tokenizer, record=record, seed=0)


def digests(prepared: Prepared) -> list[list[str]]:
    return [[each.digest for each in sample[0].media.items] for sample in prepared.train.samples if sample[0].media]


def of_files(folder: Path, *numbers: int) -> list[str]:
    return [examine((folder / "pictures" / f"{number}.png").read_bytes(), "").digest for number in numbers]


def url(folder: Path, number: int) -> str:
    data = base64.b64encode((folder / "pictures" / f"{number}.png").read_bytes()).decode()
    return f"data:image/png;base64,{data}"


def chat(question: Any, answer: str = "A cat.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
