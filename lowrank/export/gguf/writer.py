"""A GGUF file, written from front to back: header, then tensors, a few rows at a time.

The package gguf makes an object of every token of the vocabulary, in seconds; what it writes are the same bytes.
The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (version 3, little-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from lowrank.errors import ModelError

if TYPE_CHECKING:
    import gguf

MAGIC, VERSION = b"GGUF", 3
_UNSIGNED, _SIGNED, _FLOAT, _BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
"""Types of fields."""
_ALIGNMENT = 32
"""Of tensors, where `general.alignment` says nothing else."""
CHUNK = 16 << 20
"""Weights in memory as float32 at a time, beside the tensor they come from."""


def library() -> Any:
    """The `gguf` package. Raises ModelError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("GGUF files need the package gguf: pip install 'lowrank-llm[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the file. `shape` in torch's order, rows last but one; `kind`: gguf's GGMLQuantizationType."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType

    @property
    def bytes(self) -> int:
        """Size in the file, without padding."""
        block, size = library().GGML_QUANT_SIZES[self.kind]
        count = 1
        for length in self.shape:
            count *= length
        return count // block * size


def fields_of(arch: str, values: Mapping[str, Any]) -> list[bytes]:
    """The fields of a new file of this architecture."""
    return [field(name, value) for name, value in {"general.architecture": arch, **values}.items()]


def field(name: str, value: Any) -> bytes:
    """A field with its name: a number (whole ones unsigned), a truth, a text, or a list of one kind of these (whole
    numbers signed). llama.cpp expects these types."""
    if isinstance(value, bool):
        return _named(name) + struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return _named(name) + struct.pack("<II", _UNSIGNED, value)
    if isinstance(value, float):
        return _named(name) + struct.pack("<If", _FLOAT, value)
    if isinstance(value, str):
        return _named(name) + struct.pack("<I", STRING) + _named(value)
    return _named(name) + struct.pack("<I", ARRAY) + _list(list(value))


def _list(values: list[Any]) -> bytes:
    kinds = {type(value) for value in values}
    if kinds <= {str, bytes}:  # of no kind at all: the merges of a tokenizer without any
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_named, values))
    (kind,) = kinds
    number, letter = {bool: (_BOOL, "?"), int: (_SIGNED, "i"), float: (_FLOAT, "f")}[kind]
    return struct.pack(f"<IQ{len(values)}{letter}", number, len(values), *values)


def write_file(
    path: Path, fields: Sequence[bytes], entries: list[TensorEntry], data: Iterable[Iterator[np.ndarray]]
) -> None:
    """Write the file. `fields`: as `field` makes them. `data`: for each entry its bytes in order, in as many arrays as
    the giver likes."""
    offset = 0
    with path.open("wb") as file:
        file.write(struct.pack("<4sIQQ", MAGIC, VERSION, len(entries), len(fields)))
        file.writelines(fields)
        for entry in entries:
            file.write(_named(entry.name) + struct.pack("<I", len(entry.shape)))
            file.write(struct.pack(f"<{len(entry.shape)}QIQ", *reversed(entry.shape), int(entry.kind), offset))
            offset += -(-entry.bytes // _ALIGNMENT) * _ALIGNMENT
        _pad(file)
        for entry, chunks in zip(entries, data, strict=True):
            start = file.tell()
            for chunk in chunks:
                file.write(np.ascontiguousarray(chunk).data)
            assert file.tell() - start == entry.bytes, f"{entry.name}: {file.tell() - start} of {entry.bytes} bytes"
            _pad(file)


def _named(text: str | bytes) -> bytes:
    encoded = text.encode("utf-8") if isinstance(text, str) else text
    return len(encoded).to_bytes(8, "little") + encoded


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))
