"""A checkpoint on disk as it is: which tensors are in which safetensors file, and their bytes, a block at a time.

Read with plain reads rather than a memory map, so that what is resident is what is asked for, however large the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import ModelError, raise_all

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' names of dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK_BYTES = 16 << 20
"""Bytes read at once."""
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `size` bytes from `start` of `file`, row after row."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a transformers checkpoint by the names in its files, in the files' order. Nothing is loaded."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError with every file that is missing, cut short or no safetensors."""
        self.folder = folder
        self.config: dict[str, Any] = _read_json(folder / "config.json")
        self._entries: dict[str, Entry] = {}
        problems: list[str] = []
        for file in _files(folder):
            try:
                self._entries.update(read_header(file))
            except ModelError as error:
                problems.append(str(error))
        raise_all(ModelError, f"{folder}: weights are missing or damaged; get these files again", problems)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self, name: str, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `first` to `end` of a tensor (all of it by default), in its own dtype."""
        entry = self[name]
        if not entry.shape:
            return _read(entry, 0, entry.size).view(entry.dtype).reshape(())
        end = entry.shape[0] if end is None else end
        row_bytes = entry.size // max(1, entry.shape[0])
        raw = _read(entry, first * row_bytes, (end - first) * row_bytes)
        return raw.view(entry.dtype).reshape(end - first, *entry.shape[1:])

    def blocks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, in order; each is valid until the next."""
        entry = self[name]
        buffer = memoryview(bytearray(min(BLOCK_BYTES, entry.size)))
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.start)
            left = entry.size
            while left:
                got = file.readinto(buffer[: min(left, len(buffer))])
                if not got:
                    raise ModelError(f"{entry.file}: became shorter while it was read")
                yield buffer[:got]
                left -= got


def _read(entry: Entry, offset: int, size: int) -> torch.Tensor:
    raw = torch.empty(size, dtype=torch.uint8)
    view = raw.numpy().data
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start + offset)
        done = 0
        while done < size:
            got = file.readinto(view[done:])
            if not got:
                raise ModelError(f"{entry.file}: became shorter while it was read")
            done += got
    return raw


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file (8 bytes: length of a JSON header; the header; the bytes).

    ModelError if it is not whole.
    """
    try:
        size = os.stat(file).st_size
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise ModelError(f"{file.name}: damaged, or no safetensors file")
            header = json.loads(opened.read(length))
    except OSError as error:
        raise ModelError(f"{file.name}: {error.strerror or error}") from error
    except ValueError as error:
        raise error if isinstance(error, ModelError) else ModelError(f"{file.name}: its header is damaged") from error
    entries = {}
    for name, said in header.items():
        if name == "__metadata__":
            continue
        if said["dtype"] not in DTYPES:
            raise ModelError(f"{file.name}: {name} has the dtype {said['dtype']}, which lowrank does not read")
        first, end = said["data_offsets"]
        entries[name] = Entry(file, DTYPES[said["dtype"]], tuple(said["shape"]), 8 + length + first, end - first)
    expected = max((entry.start + entry.size for entry in entries.values()), default=size)
    if size < expected:
        raise ModelError(f"{file.name}: cut short, {size:,} of {expected:,} bytes")
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        index = _read_json(folder / INDEX)
        return [folder / name for name in sorted(set(index.get("weight_map", {}).values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    also = f"; it has only {', '.join(pickles[:3])}, pickles, which lowrank does not open" if pickles else ""
    raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} in it{also}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error}); is it a model's folder?") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value
