"""The messages of a chat, as OpenAI defines them: texts, and pictures within the request.

Pictures are strangers' files: their number, their bytes, their format and what their header says of their size are
looked at before anything is decoded, and they are decoded here, in the request's own thread, so that a broken one is
this request's alone. Nothing is ever fetched and no file of this machine is read.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lowrank.data.formats.columns import RowProblem, beginning
from lowrank.data.formats.turns import read_turns
from lowrank.errors import DataError
from lowrank.media.decoding import decoded, examine
from lowrank.records import Message, Picture
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engine import ImageEngine, ServeEngine
from lowrank.serve.limits import RequestLimits

_ROLES = ("system", "developer", "user", "assistant", "tool")
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""OpenAI's. The subtype that a data URL names is not believed: the bytes say what they are."""
_DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,", re.ASCII)


def read_messages(
    messages: Sequence[Mapping[str, Any]], engine: ServeEngine, limits: RequestLimits
) -> tuple[Message, ...]:
    """Turns with their pictures. ApiError for roles that OpenAI does not know, for content that is neither text nor, in
    a user's turn, a picture, and for pictures that this server, or its model, is not shown."""
    if len(messages) > limits.messages_per_request:
        message = f"{len(messages)} messages in one request; this server reads {limits.messages_per_request}"
        raise ApiError(400, message, param="messages")
    for number, message in enumerate(messages):
        _check(message, f"messages[{number}]")
    sources = [
        (source, f"messages[{number}].content") for number, each in enumerate(messages) for source in _sources(each)
    ]
    if sources:
        _check_may_see(engine, sources[0][1])
    if len(sources) > limits.pictures_per_request:
        message = f"{len(sources)} pictures in one request; this server looks at {limits.pictures_per_request}"
        raise ApiError(400, message, param="messages")
    pictures = iter([_picture(source, where, limits) for source, where in sources])
    given = [{"content": "", **{key: value for key, value in each.items() if value is not None}} for each in messages]
    try:
        turns = read_turns(given, {})
    except (RowProblem, RecursionError) as problem:
        raise ApiError(400, f"messages: {problem}", param="messages") from problem
    return tuple(
        replace(turn, media=tuple((place, next(pictures)) for place, _ in turn.media)) if turn.media else turn
        for turn in turns
    )


def details_of(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Options of pictures that have no effect: how closely a model looks follows from `model.image_max_pixels`."""
    shown = [part.get("image_url") for each in messages for part in _parts(each) if part.get("type") == "image_url"]
    details = {str(each.get("detail") or "auto") for each in shown if isinstance(each, Mapping)}
    return ["image_url.detail"] if details - {"auto"} else []


def _check(message: Mapping[str, Any], where: str) -> None:
    if message.get("role") not in _ROLES:
        known = ", ".join(_ROLES)
        raise ApiError(400, f"{where}.role: {message.get('role')!r} is none of {known}", param=where)
    seen = ("text", "image_url") if message["role"] == "user" else ("text",)
    others = [str(part.get("type"))[:60] for part in _parts(message) if part.get("type") not in seen]
    if others:
        what = "text is read, and in a user's turn pictures as image_url with data:image/...;base64,"
        text = f"{where}: unsupported content {', '.join(others)}; only {what}, and no URL is ever fetched"
        raise ApiError(400, text, param=f"{where}.content")


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _sources(message: Mapping[str, Any]) -> list[Any]:
    """Where the pictures of a turn are, in their order."""
    found = [part.get("image_url") for part in _parts(message) if part.get("type") == "image_url"]
    return [each.get("url") if isinstance(each, Mapping) else each for each in found]


def _check_may_see(engine: ServeEngine, where: str) -> None:
    problem = engine.image_problem if isinstance(engine, ImageEngine) else f"the {engine.name} engine reads text"
    if problem is not None:
        message = f"{where}: unsupported content image_url: no images are read here ({problem}), no URL is ever fetched"
        raise ApiError(400, message, param=where)


def _picture(source: Any, where: str, limits: RequestLimits) -> Picture:
    """One that can be decoded."""
    match = _DATA_URL.match(source) if isinstance(source, str) else None
    if match is None:
        raise ApiError(
            400,
            f"{where}: image_url.url: expected data:image/...;base64,... with the picture in it, got "
            f"{beginning(source, 80)}; no URL is ever fetched and no file is read",
            param=where,
        )
    if (len(source) - match.end()) * 3 // 4 > limits.picture_bytes + 2:
        raise ApiError(
            400, f"{where}: a picture of more than {limits.picture_bytes:,} bytes; make it smaller", param=where
        )
    try:
        data = base64.b64decode(source[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: a picture whose base64 cannot be read: {error}", param=where) from error
    try:
        picture = examine(data, "it", formats=_FORMATS, most_pixels=limits.picture_pixels)
        decoded(picture)  # not when the model is busy with everybody
    except DataError as error:
        raise ApiError(400, f"{where}: {error}", param=where) from error
    return picture
