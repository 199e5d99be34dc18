"""What stands at a path, found out without ever blocking on it: a file, a folder, a pipe, or nothing, and why."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import Literal

from lowrank.errors import DataError

Kind = Literal["file", "folder", "pipe", "nothing"]

TEXT_AS_ROWS = 'text itself is given as rows, in Python data=[{"text": "..."}]'
"""What a person may have meant who gives a text where a path is expected."""

STANDARD_INPUT = ("-", "/dev/stdin")
"""Names of what comes through the standard input."""
WHOLE = "all"
"""The split that is every file of a folder, whatever its name."""
_SHOWN = 120


def kind_at(path: Path) -> Kind:
    """What `path` names. Raises DataError, in one sentence, for what can be none of these (see `path_problem`)."""
    problem = path_problem(path)
    if problem:
        raise DataError(problem)
    try:
        mode = path.stat().st_mode
    except OSError:
        return "nothing"
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "pipe"


def path_problem(path: Path) -> str | None:
    """Why nothing can be read from `path`; None if something can, or if there is just nothing."""
    name = shown(path)
    try:
        mode = path.stat().st_mode
    except ValueError:
        return f"{name}: no path of a file: it has a zero byte in it"
    except OSError as error:
        return _os_problem(path, error)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        allowed = os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0))
        what = "folder" if stat.S_ISDIR(mode) else "file"
        return None if allowed else f"{name}: you may not read this {what} (permission denied); see `chmod +r`"
    if stat.S_ISFIFO(mode):
        return None
    what = "socket" if stat.S_ISSOCK(mode) else "device"
    return f"{name}: a {what}, no file; name a file, a folder, a pipe, or - for what comes through standard input"


def _os_problem(path: Path, error: OSError) -> str | None:
    name = shown(path)
    if error.errno == errno.ELOOP:
        return f"{name}: a symbolic link that leads in a circle, so there is no file behind it; make the link anew"
    if error.errno == errno.ENAMETOOLONG:
        hint = f"; {TEXT_AS_ROWS}" if looks_like_text(str(path)) else ""
        return f"{name}: no path of a file: it has {len(str(path)):,} characters, longer than the system allows{hint}"
    if error.errno == errno.EACCES:
        return f"{name}: you may not look into its folder (permission denied); see `chmod +x`"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if path.is_symlink():
            return f"{name}: a symbolic link to {shown(os.readlink(path))}, which is not there"
        return None
    return f"{name}: cannot be read: {error.strerror}"


def looks_like_text(path: str) -> bool:
    """Whether what names nothing that is there may be a text rather than a name: words, and no ending of a file."""
    return len(path.split()) > 1 and re.search(r"\.\w{1,8}$", path) is None


def is_pattern(path: str) -> bool:
    """Whether a path stands for several files (`data/*.json`)."""
    return any(mark in path for mark in "*?[")


def shown(path: Path | str) -> str:
    """A path as it can be printed: one line, of bounded length, nothing a terminal would obey."""
    text = str(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"
