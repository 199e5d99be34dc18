"""A GGUF file, written from front to back: header, then tensors, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank.errors import ModelError

if TYPE_CHECKING:
    import gguf

CHUNK = 16 << 20
"""Weights in memory as float32 at a time, beside the tensor they come from."""


def library() -> Any:
    """The `gguf` package. Raises ModelError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("GGUF files need the package gguf: pip install 'lowrank[gguf]'") from error
    return gguf


@dataclass(frozen=True)
class Entry:
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


def write_file(
    path: Path, arch: str, fields: dict[str, Any], entries: list[Entry], data: Iterable[Iterator[np.ndarray]]
) -> None:
    """Write the file. `data`: for each entry its bytes in order, in as many arrays as the giver likes."""
    gguf = library()
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for entry in entries:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        for entry, chunks in zip(entries, data, strict=True):
            start = file.tell()
            for chunk in chunks:
                chunk.tofile(file)
            assert file.tell() - start == entry.bytes, f"{entry.name}: {file.tell() - start} of {entry.bytes} bytes"
            writer.write_padding(file, entry.bytes)
        file.flush()
    finally:
        for file in writer.fout or []:
            file.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """GGUF's types: what llama.cpp expects of numbers is u32 and f32."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
