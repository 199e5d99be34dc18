"""The tensors of safetensors files, one at a time: mapped, copied out, and let go of again.

safetensors' own handles keep every page they have touched until the file is closed, so a process that reads a whole
model has all of it in its memory at the end. Here the pages of a tensor go back to the system once it is read.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError, raise_all

INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_LARGEST_HEADER = 100 << 20
"""safetensors' own limit."""


class StoredTensor:
    """One tensor of a file. `[...]` reads it, which is all that transformers' loader asks of a lazy tensor."""

    def __init__(self, file: _File, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> None:
        self.file, self.name, self.dtype, self.shape, self.start = file, name, dtype, shape, start

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self, index: int | None = None) -> torch.Tensor:
        """A copy in memory of its own; of the whole, or of one entry of the first dimension."""
        if index is None:
            return self.file.read(self)
        part = StoredTensor(self.file, self.name, self.dtype, self.shape[1:], self.start)
        part.start += index * part.nbytes
        return self.file.read(part)

    def get_shape(self) -> list[int]:
        """As safetensors' slices say it."""
        return list(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            first = file.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
                raise ModelError(_damaged(path, "it has no safetensors header"))
            try:
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
            except (ValueError, AttributeError) as error:
                raise ModelError(_damaged(path, "its header is not JSON")) from error
            self.tensors = {name: self._tensor(name, entry, 8 + length, size) for name, entry in header.items()}
            # private pages that are never written: torch wants memory it may write to
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _tensor(self, name: str, entry: Any, begin: int, size: int) -> StoredTensor:
        try:
            dtype, shape = entry["dtype"], tuple(int(each) for each in entry["shape"])
            start, end = (begin + int(offset) for offset in entry["data_offsets"])
        except (TypeError, KeyError, ValueError) as error:
            raise ModelError(_damaged(self.path, f"its header does not say where {name} is")) from error
        if dtype not in _DTYPES:
            raise ModelError(f"{self.path}: {name} is stored as {dtype}, which this torch does not know")
        tensor = StoredTensor(self, name, _DTYPES[dtype], shape, start)
        if end - start != tensor.nbytes or start < begin:
            raise ModelError(_damaged(self.path, f"{name} has {end - start} bytes and needs {tensor.nbytes}"))
        if end > size:
            raise ModelError(_damaged(self.path, f"it ends at byte {size} and {name} lies at {start} to {end}"))
        return tensor

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        count = math.prod(tensor.shape)
        if not count:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        mapped = torch.frombuffer(self.map, dtype=tensor.dtype, count=count, offset=tensor.start)
        copied = mapped.view(tensor.shape).clone()
        if hasattr(self.map, "madvise") and hasattr(mmap, "MADV_DONTNEED"):
            first = tensor.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.map.madvise(mmap.MADV_DONTNEED, first, tensor.start + tensor.nbytes - first)
        return copied


def checkpoint_files(path: str, revision: str | None) -> list[str]:
    """The safetensors files of a folder or a hub model. OSError if there are none; ModelError names missing shards."""
    single = cached_file(path, "model.safetensors", revision=revision, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [single]
    index = cached_file(path, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if index is None:
        raise OSError(f"no file named model.safetensors, and no {INDEX}, in {path}")
    try:
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(_damaged(Path(index), "it does not say which file has which tensor")) from error
    found = {
        name: cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False) for name in names
    }
    missing = [name for name, file in found.items() if file is None]
    problems = [
        f"{name}: {sum(file == name for file in weight_map.values())} tensors lie in it, among them "
        f"{next(tensor for tensor, file in weight_map.items() if file == name)}"
        for name in missing
    ]
    raise_all(ModelError, f"{index} names files that are not there; get them (again)", problems)
    return [file for file in found.values() if file is not None]


def stored_tensors(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of these files, by name; only headers are read. ModelError names a file that is damaged, and how."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        found.update(_File(Path(path)).tensors)
    return found


def _damaged(path: Path, how: str) -> str:
    return f"{path}: {how}; the file is damaged or was not downloaded to its end: get it again"
