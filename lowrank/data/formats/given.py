"""Pictures as the parts of a turn name them, before anybody has looked for their files (pictures.py does)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PLACE = "<image>"
"""What stands in a text where a picture of the row's column is shown."""
PICTURE_PARTS = ("image", "image_url", "input_image")
"""Types of content parts that are pictures: TRL's and transformers', OpenAI's of both its interfaces."""
_HELD_BY = ("image", "image_url", "path", "base64", "url", "bytes", "data")


@dataclass(frozen=True)
class Given:
    """A part of a turn that is a picture, as the data writes it; None: the next of the row's column."""

    value: Any = None


def part_of(part: Mapping[str, Any]) -> Given:
    """What a content part of type `image` or `image_url` holds."""
    for name in _HELD_BY:
        value = part.get(name)
        if isinstance(value, Mapping) and "url" in value and len(value) <= 2:  # OpenAI's {"url", "detail"}
            value = value["url"]
        if value is not None:
            return Given(value)
    return Given()
