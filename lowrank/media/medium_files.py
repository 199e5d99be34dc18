"""Files of media, whatever their kind: their bytes, read and read again, and what is said of those that are none."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import ClassVar

from lowrank.errors import DataError
from lowrank.records import Medium


class BadMedium(DataError):
    """A file that is no medium to learn from, in words. `kind` is what a report counts it as."""

    one: ClassVar[str]
    """What people call one of these."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def of(self, medium: Medium) -> BadMedium:
        """The same, with the row that names this medium."""
        return type(self)(self.kind, f"{self.detail} ({medium.row})" if medium.row else self.detail)


def read_medium(path: Path, name: str, most: int, error: type[BadMedium]) -> bytes:
    """The bytes of a file, one more than `most` where there are more. `error` where it is not there or not to be
    read."""
    missing = f"{error.one} is missing"
    try:
        if not path.is_file():
            raise error(missing, f"there is no file {name}")
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as problem:
        raise error(missing, f"{name} cannot be read: {problem.strerror}") from problem


def check_size(data: bytes, name: str, most: int, error: type[BadMedium]) -> None:
    """`error` for more than `most` bytes."""
    if len(data) > most:
        raise error(f"{error.one} too large", f"{name} has more than {most / 1e6:.0f} MB")


def digest_of(data: bytes) -> str:
    """What tells media apart."""
    return blake2b(data, digest_size=16).hexdigest()


def bytes_of(medium: Medium, most: int, error: type[BadMedium]) -> bytes:
    """The bytes of a medium that was examined; `error` where its file has gone or changed since."""
    if medium.data is not None:
        return medium.data
    assert medium.path is not None, "a medium has bytes or a path"
    data = read_medium(Path(medium.path), medium.path, most, error)
    if digest_of(data) != medium.digest:
        raise error(f"{error.one} has changed", f"{medium.path} is not what it was when the data was read")
    return data


def beginning_of(data: bytes) -> str:
    """How a file begins that is not what it should be."""
    return f"it begins with {data[:16]!r}" if data else "it is empty"


def text_of(error: Exception) -> str:
    """What a library says, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
