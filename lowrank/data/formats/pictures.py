"""The pictures of a row: from its columns and parts to their places in its turns.

    <image> in a text            the next picture of the column `images` (LLaMA-Factory, ms-swift)
    {"type": "image"} part       the same (TRL, transformers), or its own: `image`, `path`, `base64`, `url`
    {"type": "image_url"} part   OpenAI's, with `data:image/...;base64,`
    no place anywhere            all pictures before the first question (TRL)

A picture is a file (beside the data, or in `media_dir`), bytes, or base64; nothing is ever fetched.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowrank.data.formats.columns import COLUMNS, RowProblem, beginning, describe, list_of
from lowrank.data.formats.given import PLACE, Given
from lowrank.data.sources.places import shown
from lowrank.errors import DataError
from lowrank.media.decoding import decoded, examine, from_pillow, read_file
from lowrank.records import Conversation, Message, Picture, Preference, Prompted, Rated, Record, Text

_DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,", re.ASCII)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_IN_ANSWER = "a picture in an answer: the model writes text; pictures belong to questions"
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", re.ASCII)


@dataclass(frozen=True)
class Folders:
    """Where the files of pictures are: `own`, that of the data's file (None: it has none, and paths are the person's
    own), or `media`, which the settings name."""

    own: Path | None = None
    media: Path | None = None


def given_in(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str | None, list[Any]]:
    """(the column of pictures that is filled, what it holds)."""
    names = [*filter(None, [columns.get("images")]), *COLUMNS["images"]]
    name = next((each for each in names if row.get(each) is not None and row.get(each) != []), None)
    if name is None:
        return None, []
    value = row[name]
    if isinstance(value, str) and not value.strip().startswith("["):
        return (name, [value]) if value.strip() else (None, [])
    return name, [value] if isinstance(value, (bytes, Mapping)) else list_of(value, "images")


def with_pictures(
    record: Record,
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    folders: Folders,
    *,
    sees: Callable[[], bool],
    decode: bool = False,
) -> Record:
    """The record with the row's pictures in their places. RowProblem for as many places as there are not pictures,
    files that are missing, broken, elsewhere or too large, and where nobody sees them."""
    name, given = given_in(row, columns)
    turns = list(_turns(record))
    places = [_split(message) for message in turns]
    number = sum(len(media) for _, media in places)
    if name is None and not number:
        return record
    if not sees():
        _refuse_blind(name)
    if isinstance(record, Text):
        raise RowProblem(f"it has images: column {name!r} is filled, and plain text has no turn to show them in")
    for (_, media), message in zip(places, turns):
        if media and message.role == "assistant":
            raise RowProblem(_IN_ANSWER)
    waiting = sum(each.value is None for _, media in places for _, each in media)
    if waiting == 0 and given and number == 0:
        places = _before_first_question(turns, places, len(given))
    elif waiting != len(given):
        raise RowProblem(
            f"not as many places as pictures: {waiting} ({PLACE}, or parts of type image) for {len(given)} in "
            f"{f'column {name!r}' if name else 'no column of images'}"
        )
    rest = iter(given)
    shown_turns = [
        replace(message, content=text, media=tuple((at, _picture(each, rest, folders, decode)) for at, each in media))
        if media
        else message
        for message, (text, media) in zip(turns, places)
    ]
    return _with_turns(record, iter(shown_turns))


def open_parts(conversation: Conversation) -> Conversation:
    """The pictures that its content parts hold, read; `<image>` in a text stays text. RowProblem for a part without a
    picture, one that is missing or broken, and one in an answer."""
    turns = []
    for message in conversation.messages:
        if message.media and message.role == "assistant":
            raise RowProblem(_IN_ANSWER)
        parts: Any = message.media  # as read_turns leaves them: Given in the places of pictures
        if any(given.value is None for _, given in parts):
            raise RowProblem("a picture is missing: its part has none of image, image_url, path, base64, url, bytes")
        media = tuple((at, _picture(given, iter(()), Folders(), decode=False)) for at, given in parts)
        turns.append(replace(message, media=media))
    return replace(conversation, messages=tuple(turns))


def _refuse_blind(name: str | None) -> None:
    what = f"it has images: column {name!r} is filled" if name else "it has images: they stand among its turns"
    raise RowProblem(
        f"{what}, and this base reads text only (it has no tower for pictures, or not the files of its processor), so "
        "it would learn to answer about what it never sees; leave such rows out, or empty the column if the text "
        "suffices"
    )


def _turns(record: Record) -> Iterator[Message]:
    """The turns of a record, answers to be compared last."""
    if isinstance(record, Conversation):
        yield from record.messages
    elif isinstance(record, Rated):
        yield from record.conversation.messages
    elif isinstance(record, Prompted):
        yield from record.prompt.messages
    elif isinstance(record, Preference):
        yield from (*record.prompt.messages, record.chosen, record.rejected)


def _with_turns(record: Record, turns: Iterator[Message]) -> Record:
    def conversation(of: Conversation) -> Conversation:
        return replace(of, messages=tuple(next(turns) for _ in of.messages))

    if isinstance(record, Conversation):
        return conversation(record)
    if isinstance(record, Rated):
        return replace(record, conversation=conversation(record.conversation))
    if isinstance(record, Prompted):
        return replace(record, prompt=conversation(record.prompt))
    assert isinstance(record, Preference)
    return replace(record, prompt=conversation(record.prompt), chosen=next(turns), rejected=next(turns))


_Places = tuple[str, list[tuple[int, Given]]]


def _split(message: Message) -> _Places:
    """A turn's text without `<image>`, and what stands where in it."""
    parts: list[Any] = []  # texts and what is between them
    for index, text in enumerate(message.texts):
        parts += [message.media[index - 1][1]] if index else []
        first, *others = text.split(PLACE)
        parts.append(first)
        for other in others:
            parts += [Given(), other]
    content, media = "", []
    for part in parts:
        if isinstance(part, str):
            content += part
        else:
            media.append((len(content), part))
    return content, media


def _before_first_question(turns: Sequence[Message], places: list[_Places], number: int) -> list[_Places]:
    first = next((index for index, message in enumerate(turns) if message.role == "user"), None)
    if first is None:
        raise RowProblem("not as many places as pictures: it has no question to show its pictures with")
    return [
        (text, [(0, Given())] * number) if index == first else (text, media)
        for index, (text, media) in enumerate(places)
    ]


def _picture(given: Given, rest: Iterator[Any], folders: Folders, decode: bool) -> Picture:
    picture = picture_of(next(rest) if given.value is None else given.value, folders)
    try:
        if decode:
            decoded(picture)
        return picture
    except DataError as error:
        raise RowProblem(str(error)) from error


def picture_of(value: Any, folders: Folders) -> Picture:
    """What a part or a column holds: a path, bytes, base64, what `datasets` keeps, or a picture of Pillow's. RowProblem
    for anything else, and for what is none."""
    value = from_pillow(value) if hasattr(value, "getexif") else value
    try:
        data, path, name = _bytes_of(value, folders)
        return examine(data, name, path)
    except RowProblem:
        raise
    except DataError as error:
        raise RowProblem(str(error)) from error


def _bytes_of(value: Any, folders: Folders) -> tuple[bytes, str | None, str]:
    """(bytes, the file they are from, a name for people)."""
    if isinstance(value, Mapping):
        key = next((key for key in ("bytes", "base64", "path", "image", "url") if value.get(key)), None)
        if key is None:
            raise RowProblem(f"a picture is missing: there is nothing in {describe(value)}")
        held = value[key]
        if key in ("bytes", "base64") and isinstance(held, str) and not _DATA_URL.match(held):
            return _of_base64(held), None, "a picture in the row"
        return _bytes_of(held, folders)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), None, "a picture in the row"
    if hasattr(value, "getexif"):  # Pillow's, from Python
        return from_pillow(value), None, "a picture in the row"
    if not isinstance(value, str):
        raise RowProblem(f"wrong type for images: expected a path, bytes or base64, got {describe(value)}")
    if match := _DATA_URL.match(value):
        return _of_base64(value[match.end() :]), None, "a picture in the row"
    if value.startswith("data:"):
        raise RowProblem(f"wrong type for images: {beginning(value)} is no data:image/...;base64,")
    if _URL.match(value) and not value.startswith("file://"):
        raise RowProblem(
            f"a picture behind a URL: {shown(value)}; lowrank fetches nothing that data names: download it, and name "
            "the file"
        )
    if len(value) > 255 and _BASE64.fullmatch(value):
        return _of_base64(value), None, "a picture in the row"
    path = _placed(value.removeprefix("file://"), folders)
    return read_file(path, shown(path)), str(path), shown(path)


def _of_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowProblem(f"a broken picture: its base64 cannot be read ({error})") from error


def _placed(name: str, folders: Folders) -> Path:
    """The file that a row names, within the folder that the person named or the data's own."""
    if "\0" in name:
        raise RowProblem("a picture is missing: its path has a zero byte in it")
    root = folders.media or folders.own
    path = Path(name)
    if root is None:
        return path
    whole = Path(_normal(root.absolute() / path))
    inside = _normal(root.absolute())
    if whole != Path(inside) and Path(inside) not in whole.parents:
        raise RowProblem(
            f"a picture outside of the data's folder: {shown(name)} is not in {shown(root)}; set `media_dir` of the "
            "dataset to the folder that holds its pictures"
        )
    return whole


def _normal(path: Path) -> str:
    return os.path.normpath(path)
