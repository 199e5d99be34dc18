"""Rows that come through a pipe or lie in a compressed file, as a plain file: written out once per process.

Data is read more than once (to recognize it, to check it, for every epoch of a stream), and a pipe gives what it has
only once. The files lie in one temporary folder that goes with the process.
"""

from __future__ import annotations

import atexit
import bz2
import gzip
import lzma
import os
import select
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import IO, Any, cast

from lowrank.data.sources.places import shown
from lowrank.errors import DataError

_CHUNK = 1 << 20
SILENCE = 20.0
"""Seconds a named pipe may give nothing before it is given up; 15 times this for standard input, which has a writer."""
_ALWAYS_UNPACKED = 1 << 30
_LARGEST_RATIO = 200
"""Bytes of text for one of the compressed file at the most, beyond the first 1.1 GB: more is no data but a trap."""

PACKED_ENDS = (".gz", ".bz2", ".xz", ".zst", ".zip")
_done: dict[tuple[Any, ...], Path] = {}
_sources: dict[Path, str] = {}
"""What each file of ours was written from, in words."""


@cache
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="lowrank-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def naming_sources(text: str) -> str:
    """A message that names files of ours, naming what they were written from instead."""
    for path, source in _sources.items():
        text = text.replace(shown(path), source).replace(str(path), source)
    return text


def from_pipe(path: Path | None) -> Path:
    """What a pipe gives, as a file. `path=None`: what comes through standard input. DataError if nothing comes."""
    name = "standard input" if path is None else shown(path)
    descriptor = sys.stdin.fileno() if path is None else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        key = ("pipe", status.st_dev, status.st_ino)
        if key not in _done:
            if os.isatty(descriptor):
                raise DataError(f"{name}: a terminal; give rows through a pipe, `cat rows.jsonl | lowrank data -`")
            patience = SILENCE * (15 if path is None else 1)
            _done[key] = _written(partial(_read, descriptor, name, patience), "input", name, None)
        return _done[key]
    finally:
        if path is not None:
            os.close(descriptor)


def _read(descriptor: int, name: str, patience: float, size: int) -> bytes:
    """Up to `size` bytes, none at the end. A named pipe that nobody writes to is told from one at its end by `poll`."""
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    if not ready.poll(patience * 1000):
        raise DataError(
            f"{name}: nothing came through this pipe for {patience:.0f} seconds; does anything write to it?"
        )
    return os.read(descriptor, size)


def unpacked(path: Path, kind: str) -> Path:
    """A compressed file (gzip, bzip2, xz, zstd, zip of one file) as a plain one, without the end of its name.

    Raises DataError for broken files and for those that unpack to far more than data does.
    """
    status = path.stat()
    key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    if key not in _done:
        name = next((path.name[: -len(end)] for end in PACKED_ENDS if path.name.lower().endswith(end)), path.name)
        try:
            with _opened(path, kind) as file:
                inside = file.name if isinstance(file, zipfile.ZipExtFile) else name
                _done[key] = _written(file.read, Path(inside).name, shown(path), status.st_size)
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
            raise DataError(f"{shown(path)}: broken {kind} file ({error}); was it downloaded whole?") from error
    return _done[key]


def _opened(path: Path, kind: str) -> IO[bytes]:
    if kind == "gzip":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if kind in ("bzip2", "xz"):
        return (bz2.open if kind == "bzip2" else lzma.open)(path, "rb")
    if kind == "zip":
        return _only_file(path)
    try:
        import zstandard  # type: ignore[import-not-found]  # an optional package
    except ImportError as error:
        way_out = "install the package zstandard, or unpack it: `zstd -d`"
        raise DataError(f"{shown(path)}: compressed by zstd, which is not read here; {way_out}") from error
    return zstandard.open(path, "rb")


def _only_file(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [item.filename for item in archive.infolist() if not item.is_dir() and "__MACOSX" not in item.filename]
    if len(names) != 1:
        there = ", ".join(shown(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise DataError(f"{shown(path)}: an archive of {len(names)} files ({there}); unpack it and name the folder")
    return archive.open(names[0])


def _written(read: Callable[[int], bytes], name: str, source: str, packed: int | None) -> Path:
    """All that `read` gives, in a new file called `name`."""
    path = Path(tempfile.mkdtemp(dir=_folder())) / (name[-100:] or "input")
    _sources[path] = source if packed is None else f"{name} in {source}"
    size = 0
    with path.open("wb") as file:
        while chunk := read(_CHUNK):
            size += len(chunk)
            if packed is not None and size > max(_ALWAYS_UNPACKED, packed * _LARGEST_RATIO):
                path.unlink()
                raise DataError(
                    f"{source}: {packed:,} bytes unpack to more than {size:,}; unpack it yourself if that is meant"
                )
            try:
                file.write(chunk)
            except OSError as error:
                raise DataError(
                    f"{source}: no place to unpack it in {path.parent} ({error.strerror}); see TMPDIR"
                ) from error
    return path
