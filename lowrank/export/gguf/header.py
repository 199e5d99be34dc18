"""The header of a GGUF file, read without its long lists: what a quantizer needs, in a fraction of a second.

Fields are kept as the bytes they are, so that a file made of another one has the very same header but for what changes.
Format: see writer.py.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.errors import ModelError
from lowrank.export.gguf.writer import ARRAY, MAGIC, STRING, VERSION, TensorEntry, field, library
from lowrank.foreign_files import check_file

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value types that are one number, as struct writes them."""
_SHORT = 1024
"""Numbers: one for each layer."""
_MOST_DIMENSIONS = 8
"""GGML knows four."""
_ALIGNMENT = "general.alignment"
_READ = (2, VERSION)
"""Version 3 has the layout of version 2, and added files of the other byte order."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file; `start`: its first byte."""

    entry: TensorEntry
    start: int


@dataclass(frozen=True)
class Header:
    """`fields`: numbers, strings and short lists of numbers by name; `raw`: every field's bytes, name and all, in the
    file's order."""

    path: Path
    fields: dict[str, Any]
    raw: dict[str, bytes]
    tensors: dict[str, GgufTensor]

    def with_numbers(self, changed: Mapping[str, int]) -> list[bytes]:
        """`raw` with some unsigned numbers in the place of what was there, or behind it."""
        ours = {name: field(name, value) for name, value in changed.items()}
        return [*(ours.pop(name, value) for name, value in self.raw.items()), *ours.values()]

    def rows(self, name: str) -> np.ndarray:
        """A tensor's bytes, (rows, bytes of a row) uint8, mapped; for F16 and F32 (rows, width) in numpy's type."""
        entry, types = self.tensors[name].entry, library().GGMLQuantizationType
        rows = int(np.prod(entry.shape[:-1])) if len(entry.shape) > 1 else 1
        kind = {types.F32: np.float32, types.F16: np.float16}.get(entry.kind, np.uint8)
        width = entry.bytes // rows // np.dtype(kind).itemsize
        return np.memmap(self.path, dtype=kind, mode="r", offset=self.tensors[name].start, shape=(rows, width))


def read_header(path: Path) -> Header:
    """Raises ModelError if it is no GGUF file of version 3 or 2."""
    if not check_file(path):
        raise ModelError(f"{path}: damaged, or no GGUF file of version {VERSION} or 2 (it is empty)")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _read(path, data)
        except (struct.error, IndexError, UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
            raise ModelError(f"{path}: damaged, or no GGUF file of version {VERSION} or 2 ({error})") from error


def _read(path: Path, data: mmap.mmap) -> Header:
    magic, version, tensor_count, field_count = struct.unpack_from("<4sIQQ", data, 0)
    if magic != MAGIC or version not in _READ:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    at, fields, raw = 24, {}, {}
    for _ in range(field_count):
        begin = at
        name, at = _string(data, at)
        (kind,) = struct.unpack_from("<I", data, at)
        value, at = _value(data, at + 4, kind)
        raw[name] = data[begin:at]
        if value is not None:
            fields[name] = value
    found, types = [], library().GGMLQuantizationType
    for _ in range(tensor_count):
        name, at = _string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} has {dimensions:,} dimensions")
        *lengths, kind, offset = struct.unpack_from(f"<{dimensions}QIQ", data, at + 4)
        at += 4 + 8 * dimensions + 12
        found.append((TensorEntry(name, tuple(reversed(lengths)), types(kind)), offset))
    alignment = fields.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= len(data):
        raise ValueError(f"{_ALIGNMENT} is {alignment!r}")
    first = -(-at // alignment) * alignment
    return Header(path, fields, raw, {entry.name: GgufTensor(entry, first + offset) for entry, offset in found})


def _string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode("utf-8"), at + 8 + length


def _value(data: mmap.mmap, at: int, kind: int) -> tuple[Any, int]:
    """A number, a string, a short list of numbers, or None for other lists; and where it ends."""
    if kind == STRING:
        return _string(data, at)
    if kind != ARRAY:
        (number,) = struct.unpack_from(f"<{_NUMBERS[kind]}", data, at)
        return number, at + struct.calcsize(f"<{_NUMBERS[kind]}")
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _NUMBERS:
        numbers = struct.unpack_from(f"<{count}{_NUMBERS[kind]}", data, at) if count <= _SHORT else None
        return numbers, at + count * struct.calcsize(f"<{_NUMBERS[kind]}")
    if kind != STRING:
        raise ValueError("a list of lists")
    length_of = struct.Struct("<Q").unpack_from
    for _ in range(count):
        at += 8 + length_of(data, at)[0]
    return None, at
