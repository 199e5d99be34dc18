"""Pictures, videos and sounds as the parts of a turn name them; media.py then finds their files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PLACES = {"<image>": "image", "<video>": "video", "<audio>": "audio"}
"""What stands in a text where a medium of the row's column is shown or played, and its kind."""
_PLACE = re.compile("|".join(PLACES))
PICTURE_PARTS = ("image", "image_url", "input_image")
"""Types of content parts that are pictures: TRL's and transformers', OpenAI's of both its interfaces."""
PARTS = {
    **dict.fromkeys(PICTURE_PARTS, "image"),
    **dict.fromkeys(("video", "video_url"), "video"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "audio"),
}
"""Types of content parts that are media, and their kinds."""
_HELD_BY = (
    "image", "image_url", "video", "video_url", "audio", "audio_url", "input_audio", "path", "base64", "url", "bytes",
    "data", "value",
)  # fmt: skip
"""`value`: LLaMA-Factory's V1."""


@dataclass(frozen=True)
class GivenMedium:
    """A part of a turn that is a medium, as the data writes it; None: the next of the row's column of its kind."""

    value: Any = None
    kind: str = "image"


def part_of(part: Mapping[str, Any], kind: str = "image") -> GivenMedium:
    """What a content part of one of the types in PARTS holds."""
    for name in _HELD_BY:
        value = part.get(name)
        for key, beside in (("url", "detail"), ("data", "format")):  # OpenAI's
            if isinstance(value, Mapping) and key in value and value.keys() <= {key, beside}:
                value = value[key]
        if value is not None:
            return GivenMedium(value, kind)
    return GivenMedium(kind=kind)


def places_in(text: str) -> Iterator[re.Match[str]]:
    """Where a text shows or plays a medium; not where HTML begins that is closed again."""
    closed = {place: -1 if place == "<image>" else text.rfind(f"</{place[1:]}") for place in PLACES}
    return (found for found in _PLACE.finditer(text) if found.end() > closed[found[0]])
