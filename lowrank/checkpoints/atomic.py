"""Files and folders that are there whole or not at all, whenever the process or the machine dies.

New content is written beside its place, synced, and renamed into it. A folder that has something in it
cannot be renamed over on any system, so the old one steps aside first:

    .name.<token>.partial   being written; incomplete until the rename
    .name.replaced          the old folder, between the two renames; whole as long as `name` is missing
    .name.<token>.removed   being deleted

After a crash `current` finds what is valid, and `recover` puts it in its place and removes the rest.
Writers of one folder keep each other out with a lock (run_folder.py), readers need none.

Modes follow one rule, the umask, whoever wrote the bytes: safetensors and other libraries go through private temporary
files and would leave 0600 beside our 0644.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{12}\.(?:partial|removed)|replaced)")


@contextmanager
def new_file(path: Path) -> Generator[Path, None, None]:
    """Yields a temporary path to write to; afterwards the file is at `path`, durably. An exception leaves `path`."""
    partial = _beside(path, "partial")
    mode = _mode_of_new_files(partial)
    try:
        yield partial
        _set_mode(partial, mode)
        _sync_file(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Generator[Path, None, None]:
    """Yields an empty temporary folder to fill; afterwards it is at `path`, durably, instead of what was there.

    An exception leaves `path` as it was. A crash at any instant leaves the old folder or the new one to `current`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, "partial")
    partial.mkdir()
    try:
        yield partial
        _set_modes(partial)
        _sync_tree(partial)
        _replace_folder(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """`new_file` for a text, in UTF-8."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Delete a file, or a folder such that no half of it is ever seen at `path`."""
    if not path.is_dir() or path.is_symlink():
        path.unlink()
        return
    trash = _beside(path, "removed")
    os.rename(path, trash)
    _sync_folder(path.parent)
    shutil.rmtree(trash)


def current(path: Path) -> Path:
    """Where the valid content of `path` is: there, or, if a crash came between two renames, aside."""
    if path.exists() or not path.name:  # `.` has no name, and is there
        return path
    aside = _aside(path)
    return aside if aside.is_dir() else path


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is something temporary of ours."""
    return _LEFTOVER.fullmatch(name) is not None


def recover(folder: Path) -> list[str]:
    """Undo or finish what a crash interrupted in `folder` (not below it); says what was put back or removed.

    Only for whoever holds the run's lock: it would delete what another process is just writing.
    """
    done = []
    if not folder.is_dir():
        return done
    for found in sorted(folder.iterdir()):
        match = _LEFTOVER.fullmatch(found.name)
        if match is None:
            continue
        place = folder / match["name"]
        if found == _aside(place) and not place.exists():
            os.rename(found, place)
            done.append(f"{place}: put back, its replacement was interrupted")
        else:
            shutil.rmtree(found) if found.is_dir() else found.unlink()
            done.append(f"{place}: removed what an interrupted run had left ({found.name})")
    if done:
        _sync_folder(folder)
    return done


def _replace_folder(new: Path, path: Path) -> None:
    aside = _aside(path)
    if path.exists():
        if aside.exists():  # of a replacement that was complete but for this deletion
            shutil.rmtree(aside)
        os.rename(path, aside)
    os.rename(new, path)
    _sync_folder(path.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{kind}")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _mode_of_new_files(place: Path) -> int:
    """What the system gives a new file there, for the umask cannot be asked for without changing it for a moment."""
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        place.unlink()


def _set_modes(folder: Path) -> None:
    mode = stat.S_IMODE(folder.stat().st_mode)  # made a moment ago, by mkdir
    for parent, folders, files in os.walk(folder):
        for name in folders:
            _set_mode(Path(parent, name), mode)
        for name in files:
            _set_mode(Path(parent, name), mode & 0o666)


def _set_mode(path: Path, mode: int) -> None:
    """Rights to execute are left; so is a file that has other names too, as a link to one of the base's files has."""
    status = path.lstat()
    is_file = stat.S_ISREG(status.st_mode)
    if (is_file and status.st_nlink == 1) or stat.S_ISDIR(status.st_mode):
        wanted = mode | (stat.S_IMODE(status.st_mode) & 0o111 if is_file else 0)
        if wanted != stat.S_IMODE(status.st_mode):
            with suppress(OSError):  # file systems without modes
                os.chmod(path, wanted)


def _sync_tree(folder: Path) -> None:
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync_file(Path(parent, name))
        _sync_folder(Path(parent))


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there; NTFS journals the rename
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
