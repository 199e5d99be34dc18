"""The files of media that rows name: a path within their folder, bytes, base64, or what `datasets` keeps. A URL is
fetched where the person said so for the dataset."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.data.formats.columns import RowProblem, beginning, describe
from lowrank.data.sources.places import shown
from lowrank.errors import DataError
from lowrank.media import audio, decoding, video
from lowrank.media.audio import BadAudio, examine_audio, read_audio_file
from lowrank.media.decoding import BadImage, decoded, examine, from_pillow, read_file
from lowrank.media.fetching import fetched
from lowrank.media.medium_files import BadMedium
from lowrank.media.video import BadVideo, examine_video, read_video_file, video_of
from lowrank.records import COLUMN_NAMES, Audio, Medium, Picture, Video

_DATA_URL = re.compile(r"data:(?:image|audio|video)/[a-zA-Z0-9.+-]+(?:;[a-zA-Z0-9=.+-]+)?;base64,", re.ASCII)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}(?:={1,2}\s*)?", re.ASCII)
"""Blanks have one place only where they may match: else many of them would take time that grows with their square."""
_ERRORS: dict[str, type[BadMedium]] = {"image": BadImage, "video": BadVideo, "audio": BadAudio}
_MOST_BYTES = {"image": decoding.MOST_BYTES, "video": video.MOST_BYTES, "audio": audio.MOST_BYTES}
_EXAMINE: dict[str, Callable[[bytes, str], Medium]] = {
    "image": examine,
    "video": examine_video,
    "audio": examine_audio,
}
_HOLDERS = ("bytes", "base64", "path", "image", "video", "audio", "url")
_READ: dict[str, Callable[[Path, str], bytes]] = {
    "image": read_file,
    "video": read_video_file,
    "audio": read_audio_file,
}


@dataclass(frozen=True)
class Folders:
    """Where the files of media are: `own`, that of the data's file (None: it has none, and paths are the person's own),
    or `media`, which the settings name. `fetches`: a URL is fetched. `within`: the only folders of `own` that are
    reached; empty: all."""

    own: Path | None = None
    media: Path | None = None
    fetches: bool = False
    within: tuple[str, ...] = ()


def medium_of(value: Any, kind: str, folders: Folders, *, decode: bool = False) -> Medium:
    """What a part or a column of a kind holds, decoded as well if asked. RowProblem for what is none."""
    try:
        if kind == "image":
            return picture_of(value, folders, decode=decode)
        return (_audio_of if kind == "audio" else _video_of)(value, folders, decode)
    except RowProblem:
        raise
    except DataError as error:
        raise RowProblem(str(error)) from error


def picture_of(value: Any, folders: Folders, *, decode: bool = False) -> Picture:
    """A picture of a path, bytes, base64, what `datasets` keeps, or of Pillow's. RowProblem for anything else, and for
    what is none."""
    try:
        data, path, name = _bytes_of(value, "image", folders)
        picture = examine(data, name, path)
        if decode:
            decoded(picture)
        return picture
    except RowProblem:
        raise
    except DataError as error:
        raise RowProblem(str(error)) from error


def _audio_of(value: Any, folders: Folders, decode: bool) -> Audio:
    if isinstance(value, Mapping) and value.get("array") is not None:
        raise RowProblem(
            "wrong type for audios: samples without their file; keep the file instead (of `datasets`: "
            "cast_column(name, Audio(decode=False)))"
        )
    data, path, name = _bytes_of(value, "audio", folders)
    return examine_audio(data, name, path, decode=decode)


def _video_of(value: Any, folders: Folders, decode: bool) -> Video:
    if isinstance(value, Mapping) and isinstance(value.get("video"), (list, tuple)):
        value = value["video"]
    if isinstance(value, (list, tuple)):
        return video_of([picture_of(each, folders, decode=decode) for each in value])
    data, path, name = _bytes_of(value, "video", folders)
    return examine_video(data, name, path, decode=decode)


def _bytes_of(value: Any, kind: str, folders: Folders) -> tuple[bytes, str | None, str]:
    """(bytes, the file they are from, a name for people)."""
    one = _ERRORS[kind].one
    if isinstance(value, Mapping):
        key = next((key for key in _HOLDERS if value.get(key)), None)
        if key is None:
            raise RowProblem(f"{one} is missing: there is nothing in {describe(value)}")
        held = value[key]
        if key in ("bytes", "base64") and isinstance(held, str) and not _DATA_URL.match(held):
            return _of_base64(held, one), None, f"{one} in the row"
        return _bytes_of(held, kind, folders)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), None, f"{one} in the row"
    if hasattr(value, "getexif"):  # Pillow's, from Python
        return from_pillow(value), None, f"{one} in the row"
    if not isinstance(value, str):
        raise RowProblem(
            f"wrong type for {COLUMN_NAMES[kind]}: expected a path, bytes or base64, got {describe(value)}"
        )
    if match := _DATA_URL.match(value):
        return _of_base64(value[match.end() :], one), None, f"{one} in the row"
    if value.startswith("data:"):
        raise RowProblem(f"wrong type for {COLUMN_NAMES[kind]}: {beginning(value)} is no data:{kind}/...;base64,")
    if _URL.match(value) and not value.startswith("file://"):
        if not folders.fetches:
            raise RowProblem(
                f"{one} behind a URL: {shown(value)}; nothing is fetched unless you say so: download it, and name the "
                "file, or set `fetch_media: true` of the dataset (`--fetch-media`)"
            )
        path = fetched(value, shown(value), _MOST_BYTES[kind], _ERRORS[kind], _EXAMINE[kind])
        return _READ[kind](path, shown(value)), str(path), shown(value)
    if len(value) > 255 and _BASE64.fullmatch(value):
        return _of_base64(value, one), None, f"{one} in the row"
    path = _placed(value.removeprefix("file://"), one, folders)
    try:
        return _READ[kind](path, shown(path)), str(path), shown(path)
    except BadMedium as error:
        if folders.media is not None or os.path.exists(path):  # not Path.exists, which raises for names too long
            raise
        raise RowProblem(
            f"{error}; set `media_dir` of the dataset (`--media-dir`) to the folder that its {one.removeprefix('a ')}s "
            "are named from"
        ) from error


def _of_base64(text: str, one: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowProblem(f"{one.replace('a ', 'a broken ', 1)}: its base64 cannot be read ({error})") from error


def _placed(name: str, one: str, folders: Folders) -> Path:
    """The file that a row names, within the folder that the person named or the data's own."""
    if "\0" in name:
        raise RowProblem(f"{one} is missing: its path has a zero byte in it")
    root = folders.media or folders.own
    path = Path(name)
    if root is None:
        return path
    whole = Path(_normal(root.absolute() / path))
    inside = _normal(root.absolute())
    beyond = whole != Path(inside) and Path(inside) not in whole.parents
    if not beyond and folders.media is None and folders.within:
        beyond = not any(Path(inside, each) in whole.parents for each in folders.within)
    if beyond:
        raise RowProblem(
            f"{one} outside of the data's folder: {shown(name)} is not in {shown(root)}; set `media_dir` of the "
            f"dataset to the folder that holds its {one.removeprefix('a ')}s"
        )
    return whole


def _normal(path: Path) -> str:
    return os.path.normpath(path)
