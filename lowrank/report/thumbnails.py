"""Small pictures of what questions show, beside the predictions in their folder, for report.html to hold as data.

thumbnails.json    {name of the picture, as predictions.jsonl has it: data:image/jpeg;base64,...}
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank.checkpoints.atomic import write_text
from lowrank.foreign_files import find_json
from lowrank.records import Picture

if TYPE_CHECKING:
    from lowrank.evaluate.questions import Question

FILE = "thumbnails.json"
_MOST = 100
"""Questions with thumbnails; a report shows six."""
_SIDE = 160
"""Pixels of the longer one."""
_BEGINNING = "data:image/jpeg;base64,"


def write_thumbnails(folder: Path, questions: Sequence[Question]) -> None:
    """Of the first questions with pictures; no file where there are none."""
    from lowrank.data.chat.placeholders import media_in  # with torch and numpy, which those who read do without
    from lowrank.media.decoding import BadImage

    found: dict[str, str] = {}
    shown = [question for question in questions if media_in(question.prompt)][:_MOST]
    for question in shown:
        for medium in media_in(question.prompt):
            if isinstance(medium, Picture) and medium.name not in found:
                try:
                    found[medium.name] = _thumbnail(medium)
                except BadImage:  # it has gone since it was answered about; its name stays
                    continue
    (folder / FILE).unlink(missing_ok=True)
    if found:
        write_text(folder / FILE, json.dumps(found, ensure_ascii=False) + "\n")


def read_thumbnails(folder: Path) -> Mapping[str, str]:
    """By the pictures' names; nothing that is not a picture as data."""
    found = find_json(folder / FILE) or {}
    return {name: text for name, text in found.items() if isinstance(text, str) and text.startswith(_BEGINNING)}


def _thumbnail(picture: Picture) -> str:
    from lowrank.media.decoding import decoded

    image = decoded(picture)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return _BEGINNING + base64.b64encode(buffer.getvalue()).decode()
