"""Files of strangers, read in bounded time and memory: model folders, adapter folders, run folders.

What is said of them names the file and what is wrong with it. JSON is small and never deep; a name in a file is a name
in its own folder; what is to be read is a file, not a pipe that nobody writes into.
"""

from __future__ import annotations

import json
import os
import re
import select
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from lowrank.errors import LowrankError, ModelError, first_line

SILENCE = 20.0
"""Seconds a pipe may give nothing before it is given up."""
LARGEST_JSON = 64 << 20
"""Bytes. The largest index of a published model (a mixture in hundreds of shards) is below 20 MB."""
DEEPEST_JSON = 100
MOST_VALUES = 8_000_000
"""Or brackets. A tokenizer with 256,000 tokens and their merges has about two million."""
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[]{}", bytes([2, 0, 2, 0]))
"""One more than how much deeper it goes at a bracket."""


def check_file(path: Path, error: type[LowrankError] = ModelError) -> int:
    """Bytes of a file that can be read; `error` says why it cannot: missing, a folder, a pipe, a loop of links, no
    rights, a name too long. Never waits."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise error(f"{path}: {kind}, where a file is expected")
        with open(path, "rb"):
            return status.st_size
    except (OSError, ValueError) as problem:
        if isinstance(problem, LowrankError):
            raise
        described = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{str(path)[:300]}: cannot be read ({described})") from problem


def read_at_most(path: Path, most: int, error: type[LowrankError]) -> bytes:
    """The first `most` bytes of a file, or of a pipe that somebody writes into; one who writes nothing for
    `SILENCE` seconds is not waited for."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:
        described = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{path} cannot be read: {described}") from problem
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise error(f"{path} cannot be read: it is a folder")
        return b"".join(_chunks(path, descriptor, most, error))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}") from problem
    finally:
        os.close(descriptor)


def _chunks(path: Path, descriptor: int, most: int, error: type[LowrankError]) -> Iterator[bytes]:
    waits = hasattr(select, "poll") and not stat.S_ISREG(os.fstat(descriptor).st_mode)
    while most > 0:
        if waits:  # a pipe without a writer is at its end for `read`, and nothing at all for `poll`
            ready = select.poll()
            ready.register(descriptor, select.POLLIN)
            if not ready.poll(SILENCE * 1000):
                raise error(
                    f"{path}: nothing came through this pipe for {SILENCE:.0f} seconds; does anything write to it?"
                )
        chunk = os.read(descriptor, min(most, 1 << 20))
        if not chunk:
            return
        most -= len(chunk)
        yield chunk


def read_json(path: Path, error: type[LowrankError] = ModelError, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. `hint` ends the sentence of an error: `; is it a model's folder?`."""
    size = check_file(path, error)
    if size > LARGEST_JSON:
        raise error(
            f"{path}: {size / 1e6:.0f} MB of JSON, more than the {LARGEST_JSON / 1e6:.0f} MB that are read{hint}"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: cannot be read as UTF-8 text ({_short(problem)}){hint}") from problem
    return parse_json(text, str(path), error, hint)


def find_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none that can be read."""
    try:
        return read_json(path)
    except ModelError:
        return None


def find_object(line: str | bytes) -> dict[str, Any] | None:
    """The object in a line of JSON Lines; None for one that is torn, too deep, or something else. For files of many
    lines: unlike `find_json` it looks at no line twice."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_json(text: str | bytes, what: str, error: type[LowrankError] = ModelError, hint: str = "") -> dict[str, Any]:
    """The object in a JSON text; `what` is its name in errors."""
    _check_nesting(text, what, error, hint)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{what}: cannot be read as JSON ({_short(problem)}){hint}") from problem
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object{hint}")
    if is_deeper(value, DEEPEST_JSON):
        raise error(f"{what}: cannot be read as JSON (nested more than {DEEPEST_JSON} deep){hint}")
    return value


def _check_nesting(text: str | bytes, what: str, error: type[LowrankError], hint: str) -> None:
    """`error` for a text that is deep, or has very many values: before anything is made of it."""
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    opened = raw.count(b"[") + raw.count(b"{")
    if max(raw.count(b","), opened) > MOST_VALUES:
        raise error(f"{what}: more than {MOST_VALUES:,} values, which is no file of this kind{hint}")
    if opened > DEEPEST_JSON:
        brackets = _STRINGS.sub(b"", raw).translate(_STEPS, _NO_BRACKETS)
        if max(accumulate(step - 1 for step in brackets), default=0) > DEEPEST_JSON:
            raise error(f"{what}: cannot be read as JSON (nested more than {DEEPEST_JSON} deep){hint}")


def write_json(path: Path, value: Mapping[str, Any], indent: int = 2) -> None:
    """As people read it, with a newline at the end."""
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def name_problem(name: Any) -> str | None:
    """Why a file's name in somebody's file is no name in the same folder; None: it is one."""
    if not isinstance(name, str) or not name:
        return f"{name!r} is no file name"
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\", "~")) or ".." in parts or "\0" in name or ":" in parts[0] or len(name) > 255:
        return f"{name[:80]!r} leads out of the folder, or is no file name"
    return None


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a link in `folder` leads out of it. The hub's cache does not count, where a snapshot is links to the
    blobs beside it."""
    try:
        target, own = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError):
        return True
    blobs = own.parent.parent / "blobs" if own.parent.name == "snapshots" else None
    return not target.is_relative_to(own) and not (blobs is not None and target.parent == blobs)


def check_folder(folder: Path, error: type[LowrankError] = ModelError) -> None:
    """`error` if something lies in a folder that would be waited for, or cannot be followed: pipes, loops of links."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as problem:
        raise error(f"{folder}: cannot be looked into ({problem.strerror or problem})") from problem
    for entry in entries:
        if not entry.name.startswith(".") and not os.path.isdir(entry.path):
            check_file(Path(entry.path), error)


def is_deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than `most` deep."""
    level: Iterable[Any] = [value]
    for _ in range(most):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def _short(problem: BaseException) -> str:
    return "nested too deep" if isinstance(problem, RecursionError) else first_line(problem)
