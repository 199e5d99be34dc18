"""A checkpoint on disk as it is: which tensors are in which safetensors file, and their values when asked for.

Read with plain reads rather than a memory map (safetensors' own handles keep every page they have touched), so that
what is resident is what was asked for, however large the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError, raise_all
from lowrank.foreign_files import check_file, name_problem, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BLOCK_BYTES = 16 << 20
"""Bytes read at once where a tensor is only passed on."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
"""safetensors' names of dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100 << 20
"""safetensors' own limit."""
_LARGEST_SIZE = 1 << 62
_AGAIN = "; the file is damaged or was not downloaded to its end: get it again"


class StoredTensor:
    """One tensor of a file, `nbytes` from byte `start`. `[...]` reads it, which is all that transformers' loader asks
    of a lazy tensor."""

    def __init__(self, file: Path, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> None:
        self.file, self.name, self.dtype, self.shape, self.start = file, name, dtype, shape, start

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def read(self) -> torch.Tensor:
        """A copy in memory of its own."""
        return self._read(0, self.nbytes).view(self.dtype).view(self.shape)

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Rows `first` to `end`; of a scalar all there is."""
        if not self.shape:
            return self.read()
        row_bytes = self.nbytes // max(1, self.shape[0])
        raw = self._read(first * row_bytes, (end - first) * row_bytes)
        return raw.view(self.dtype).view(end - first, *self.shape[1:])

    def part(self, first: int, size: int) -> torch.Tensor:
        """`size` bytes from its byte `first`, in memory of their own."""
        return self._read(first, size)

    def blocks(self) -> Iterator[memoryview]:
        """Its bytes, in order; each block is valid until the next."""
        buffer = memoryview(bytearray(min(BLOCK_BYTES, self.nbytes)))
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                got = file.readinto(buffer[: min(left, len(buffer))])
                if not got:
                    raise ModelError(f"{self.file}: became shorter while it was read")
                yield buffer[:got]
                left -= got

    def get_shape(self) -> list[int]:
        """As safetensors' slices say it."""
        return list(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def _read(self, offset: int, size: int) -> torch.Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        view = raw.numpy().data
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start + offset)
            done = 0
            while done < size:
                got = file.readinto(view[done:])
                if not got:
                    raise ModelError(f"{self.file}: became shorter while it was read")
                done += got
        return raw


class CheckpointFiles(Mapping[str, StoredTensor]):
    """The tensors of a model's folder by the names in its files, in the files' order. Nothing is loaded."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelError with every file that is missing, cut short or no safetensors."""
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json", hint="; is it a model's folder?")
        self._tensors: dict[str, StoredTensor] = {}
        try:
            files, problems = _find(str(folder), None)
        except OSError as error:
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            also = f"; it has only {', '.join(pickles[:3])}, pickles, which lowrank does not open" if pickles else ""
            raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} in it{also}") from error
        for file in files:
            try:
                self._tensors.update(_tensors_of(Path(file)))
            except ModelError as error:
                problems.append(str(error))
        raise_all(ModelError, f"{folder}: weights are missing or damaged; get these files again", problems)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def checkpoint_files(path: str, revision: str | None) -> list[str]:
    """The safetensors files of a folder or a hub model. OSError if there are none; ModelError names missing shards."""
    files, problems = _find(path, revision)
    raise_all(ModelError, f"{INDEX} of {path} names files that are not there; get them (again)", problems)
    return files


def stored_tensors(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """Every tensor of these files, by name; only headers are read. ModelError names a file that is damaged, and how."""
    found: dict[str, StoredTensor] = {}
    for path in files:
        found.update(_tensors_of(Path(path)))
    return found


def _find(path: str, revision: str | None) -> tuple[list[str], list[str]]:
    """The files that are there, and a sentence for each that is not. OSError if none is named."""
    single = _cached(path, SINGLE, revision)
    if single is not None:
        return [single], []
    index = _cached(path, INDEX, revision)
    if index is None:
        raise OSError(f"no file named {SINGLE}, and no {INDEX}, in {path}")
    try:
        weight_map = read_json(Path(index))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(_damaged(Path(index), "it does not say which file has which tensor")) from error
    found_problems = [problem for name in names if (problem := name_problem(name)) is not None]
    raise_all(ModelError, f"{index}: it names files outside the model's folder", found_problems)
    found = {name: _cached(path, name, revision) for name in names}
    problems = [
        f"{name}: {sum(each == name for each in weight_map.values())} tensors lie in it, among them "
        f"{next(tensor for tensor, each in weight_map.items() if each == name)}"
        for name, file in found.items()
        if file is None
    ]
    return [file for file in found.values() if file is not None], problems


def _cached(path: str, name: str, revision: str | None) -> str | None:
    return cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """What the header of a safetensors file says (8 bytes: its length; the header, JSON; the bytes), in their order."""
    check_file(path)
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise ModelError(_damaged(path, "it has no safetensors header"))
        header = parse_json(file.read(length), f"{path}: the header", hint=_AGAIN)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    end, before = 8 + length, ""
    for name, tensor in ordered.items():
        if tensor.nbytes and tensor.start < end:
            raise ModelError(_damaged(path, f"{name} lies on the bytes of {before}"))
        end, before = max(end, tensor.start + tensor.nbytes), name
    return ordered


def _tensor(path: Path, name: str, entry: Any, begin: int, size: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = (begin + offset for offset in entry["data_offsets"])
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(_damaged(path, f"its header does not say where {name} is")) from error
    if not all(type(each) is int and 0 <= each < _LARGEST_SIZE for each in (*shape, start, end)):
        raise ModelError(_damaged(path, f"{name}: shape {str(list(shape))[:80]} at {str(entry['data_offsets'])[:60]}"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(f"{path}: {name} is stored as {dtype}, which this torch does not know")
    tensor = StoredTensor(path, name, DTYPES[dtype], shape, start)
    if end - start != tensor.nbytes or start < begin:
        raise ModelError(_damaged(path, f"{name} has {end - start} bytes and needs {tensor.nbytes}"))
    if end > size:
        raise ModelError(_damaged(path, f"it ends at byte {size} and {name} lies at {start} to {end}"))
    return tensor


def _damaged(path: Path, how: str) -> str:
    return f"{path}: {how}{_AGAIN}"
