"""Whether a picture's file has its end, by its structure and without decoding.

What stands behind the end is no part of the picture: telephones put a film there (motion photos), cameras further
pictures (MPO), programs what they like. So a file is walked from its beginning, and what looks like an end within it
(a JPEG of its own in EXIF) is passed over.
"""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""Of JPEG; within a scan FF is followed by 00, or by the number of a restart. FFs may come before one: not matched, for
a file of nothing else would take time that grows with its square."""
_END, _SCAN = 0xD9, 0xDA
_STRIPS = ((273, 279), (324, 325))
"""Of TIFF: where strips (or tiles) are, and how many bytes they have."""


def is_cut_off(data: bytes, image: Image) -> bool:
    """Whether the end of `image`, of which `data` is the file, is missing; of what moves, that of the first frame."""
    kind = image.format or ""
    if kind in ("JPEG", "MPO"):
        return not _jpeg_ends(data)
    if kind == "PNG":
        return not _png_ends(data)
    if kind == "GIF":
        return not _gif_ends(data)
    if kind == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data) + 1
    return _last_byte(image) > len(data)


def _jpeg_ends(data: bytes) -> bool:
    at = 2
    while found := _MARKER.search(data, at):
        at = found.end()
        marker = data[at - 1]
        if marker == _END:
            return True
        if marker != 0x01 and marker != 0xD8:  # which have no length
            at += int.from_bytes(data[at : at + 2], "big")
    return False


def _png_ends(data: bytes) -> bool:
    at = 8
    while at + 12 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return False


def _gif_ends(data: bytes) -> bool:
    """Whether the first frame does."""
    if len(data) < 13:
        return False
    at = 13 + _gif_table(data[10])
    while at < len(data):
        kind = data[at]
        if kind == 0x3B:
            return False
        if kind == 0x2C and at + 10 < len(data):
            at = _behind_blocks(data, at + 10 + _gif_table(data[at + 9]) + 1)
            return at <= len(data)
        at = _behind_blocks(data, at + 2) if kind == 0x21 else at + 1  # what is neither, readers pass over
    return False


def _gif_table(flags: int) -> int:
    """Bytes of the table of colors that these flags announce."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> int:
    """The place behind the empty block that ends those at `at`; behind the file where there is none."""
    while at < len(data):
        size = data[at]
        at += 1 + size
        if not size:
            return at
    return len(data) + 1


def _last_byte(image: Any) -> int:
    """Bytes that a BMP or TIFF needs for its pixels; 0: not known before it is decoded."""
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        found = [0]
        with contextlib.suppress(Exception):  # tags of another type than they should have
            for starts, counts in _STRIPS:
                found += [int(a) + int(b) for a, b in zip(tags.get(starts, ()), tags.get(counts, ()))]
        return max(found)
    ends = [0]
    for name, box, offset, args in image.tile:
        if name == "raw" and isinstance(args, tuple) and len(args) > 1 and isinstance(args[1], int):
            ends.append(offset + args[1] * (box[3] - box[1]))
    return max(ends)
