"""The pictures, videos and sounds of a row: from its columns and parts to their places in its turns.

    <image>, <video>, <audio> in a text    the next of the column `images`, `videos`, `audios` (LLaMA-Factory, ms-swift)
    {"type": "image"}, {"type": "audio"}   the same (TRL, transformers), or its own: `image`, `audio`, `path`, `base64`
    {"type": "image_url"}, "input_audio"   OpenAI's, with base64
    no place anywhere                      all before the first question (TRL)

A medium is a file (beside the data, or in `media_dir`), bytes, or base64; a URL with `fetch_media` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowrank.data.formats.columns import COLUMNS, RowProblem, list_of
from lowrank.data.formats.inline_media import PLACES, GivenMedium, places_in
from lowrank.data.formats.media_files import Folders, medium_of
from lowrank.records import (
    COLUMN_NAMES,
    KIND_NAMES,
    Conversation,
    Medium,
    Message,
    Preference,
    Prompted,
    Rated,
    Record,
    Text,
)

_IN_ANSWER = {
    "image": "a picture in an answer: the model writes text; pictures belong to questions",
    "video": "a video in an answer: the model writes text; videos belong to questions",
    "audio": "a sound in an answer: the model writes text; sounds belong to questions",
}
_TOWER = {"image": "tower for pictures", "video": "tower for videos", "audio": "tower for sounds"}


@dataclass(frozen=True)
class Column:
    """A column of media of a row that is filled; `name` None: there is none."""

    name: str | None
    values: list[Any]


def given_in(row: Mapping[str, Any], columns: Mapping[str, str], kind: str) -> Column:
    """The column of a kind of media that is filled, and what it holds."""
    part = COLUMN_NAMES[kind]
    names = [*filter(None, [columns.get(part)]), *COLUMNS[part]]
    name = next((each for each in names if row.get(each) is not None and row.get(each) != []), None)
    if name is None:
        return Column(None, [])
    value = row[name]
    if isinstance(value, str) and not value.strip().startswith("["):
        return Column(name, [value]) if value.strip() else Column(None, [])
    return Column(name, [value] if isinstance(value, (bytes, Mapping)) else list_of(value, part))


def with_media(
    record: Record,
    row: Mapping[str, Any],
    columns: Mapping[str, str],
    folders: Folders,
    *,
    takes: Callable[[str], bool],
    decode: bool = False,
    place: str = "",
) -> Record:
    """The record with the row's media in their places; `place` is that of the row, in words.

    RowProblem for as many places as there are not media, files that are missing, broken, elsewhere or too large, and
    for a kind that the model does not take.
    """
    given = {kind: given_in(row, columns, kind) for kind in COLUMN_NAMES}
    turns = list(_turns(record))
    places = [_split(message) for message in turns]
    standing = [each for _, media in places for _, each in media]
    if not standing and all(column.name is None for column in given.values()):
        return record
    present = {each.kind for each in standing} | {kind for kind, column in given.items() if column.name is not None}
    for kind in given:
        if kind in present and not takes(kind):
            _refuse_unable(kind, given[kind].name)
    if isinstance(record, Text):
        kind, name = next((kind, column.name) for kind, column in given.items() if column.name)
        raise RowProblem(
            f"it has {COLUMN_NAMES[kind]}: column {name!r} is filled, and plain text has no turn to show them in"
        )
    for (_, media), message in zip(places, turns):
        if media and message.role == "assistant":
            raise RowProblem(_IN_ANSWER[media[0][1].kind])
    for kind, column in given.items():
        places = _matched(kind, column, turns, places)
    rest = {kind: iter(column.values) for kind, column in given.items()}

    def read(each: GivenMedium) -> Any:
        value = next(rest[each.kind]) if each.value is None else each.value
        return replace(medium_of(value, each.kind, folders, decode=decode), row=place)

    shown_turns = [
        replace(message, content=text, media=tuple((at, read(each)) for at, each in media)) if media else message
        for message, (text, media) in zip(turns, places)
    ]
    return _with_turns(record, iter(shown_turns))


def without_media(record: Record) -> tuple[Record, tuple[Medium, ...]]:
    """The record as text alone, and its media in order; a turn that has nothing beside them says what they are."""
    media = tuple(medium for message in _turns(record) for _, medium in message.media)
    if not media:
        return record, ()
    texts = [
        replace(message, content=message.content or " ".join(f"[{each.shown}]" for _, each in message.media), media=())
        for message in _turns(record)
    ]
    return _with_turns(record, iter(texts)), media


def open_parts(conversation: Conversation) -> Conversation:
    """The media that its content parts hold, read; `<image>` in a text stays text. RowProblem for a part without a
    medium, one that is missing or broken, and one in an answer."""
    turns = []
    for message in conversation.messages:
        parts: Any = message.media  # as read_turns leaves them: Given in the places of media
        if parts and message.role == "assistant":
            raise RowProblem(_IN_ANSWER[parts[0][1].kind])
        missing = next((given.kind for _, given in parts if given.value is None), None)
        if missing == "image":
            raise RowProblem("a picture is missing: its part has none of image, image_url, path, base64, url, bytes")
        if missing is not None:
            one = KIND_NAMES[missing][:-1]
            raise RowProblem(
                f"a {one} is missing: its part has none of {missing}, {missing}_url, path, base64, url, data"
            )
        media = tuple((at, medium_of(given.value, given.kind, Folders())) for at, given in parts)
        turns.append(replace(message, media=media))
    return replace(conversation, messages=tuple(turns))


def _refuse_unable(kind: str, name: str | None) -> None:
    part = COLUMN_NAMES[kind]
    what = f"it has {part}: column {name!r} is filled" if name else f"it has {part}: they stand among its turns"
    able = {"image": "reads text only", "video": "takes no videos", "audio": "takes no sounds"}[kind]
    never = "hears" if kind == "audio" else "sees"
    raise RowProblem(
        f"{what}, and this base {able} (it has no {_TOWER[kind]}, or not the files of its processor, or is loaded "
        f"without), so it would learn to answer about what it never {never}; leave such rows out, or empty the column "
        "if the text suffices"
    )


def _matched(kind: str, column: Column, turns: Sequence[Message], places: list[_Places]) -> list[_Places]:
    """The places, with those that a column of a kind has none for; RowProblem where their numbers differ."""
    standing = [each for _, media in places for _, each in media if each.kind == kind]
    waiting = sum(each.value is None for each in standing)
    if not standing and column.values:
        return _before_first_question(turns, places, [GivenMedium(kind=kind)] * len(column.values))
    if waiting != len(column.values):
        place = next(place for place, each in PLACES.items() if each == kind)
        beside = f"column {column.name!r}" if column.name else f"no column of {COLUMN_NAMES[kind]}"
        raise RowProblem(
            f"not as many places as {KIND_NAMES[kind]}: {waiting} ({place}, or parts of type {kind}) for "
            f"{len(column.values)} in {beside}"
        )
    return places


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


_Places = tuple[str, list[tuple[int, GivenMedium]]]


def _split(message: Message) -> _Places:
    """A turn's text without its places, and what stands where in it."""
    given: Any = message.media  # as read_turns leaves them
    content, media = "", []
    for index, text in enumerate(message.texts):
        if index:
            media.append((len(content), given[index - 1][1]))
        at = 0
        for found in places_in(text):
            content += text[at : found.start()]
            media.append((len(content), GivenMedium(kind=PLACES[found[0]])))
            at = found.end()
        content += text[at:]
    return content, media


def _before_first_question(turns: Sequence[Message], places: list[_Places], more: list[GivenMedium]) -> list[_Places]:
    first = next((index for index, message in enumerate(turns) if message.role == "user"), None)
    if first is None:
        names = KIND_NAMES[more[0].kind]
        raise RowProblem(f"not as many places as {names}: it has no question to show its {names} with")
    return [
        (text, [*((0, each) for each in more), *media] if index == first else media)
        for index, (text, media) in enumerate(places)
    ]
