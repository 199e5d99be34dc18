"""A model's folder as a 16-bit checkpoint: as it is, or, where somebody quantized it, unpacked as it is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lowrank.errors import ModelError
from lowrank.kernels.precision import float32_or_wider
from lowrank.models.loading.checkpoint_files import BLOCK_BYTES, CheckpointFiles, StoredTensor
from lowrank.models.prequantized import PrequantizedReader, by_linear, reader_for


class TensorSource(Protocol):
    """A tensor of a checkpoint: values when asked for. `dtype`: what it counts as; `rows` may give more precision."""

    @property
    def dtype(self) -> torch.dtype:
        """What it counts as: the dtype of `blocks`."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the files: (O, D) of a linear's weight."""
        ...

    def read(self) -> torch.Tensor:
        """The whole."""
        ...

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Rows `first` to `end`."""
        ...

    def blocks(self) -> Iterator[memoryview]:
        """Its bytes in `dtype`, in order; each block is valid until the next."""
        ...


def widened(weight: torch.Tensor) -> torch.Tensor:
    """In float32, or as it is where that is wider."""
    return weight.to(float32_or_wider(weight.dtype))


class Weights(Mapping[str, TensorSource]):
    """The tensors of a model's folder by their names in its files; the weight of a quantized linear is `NAME.weight`.

    config   config.json, as it is
    method   its quant_method; None if nothing is quantized
    """

    def __init__(self, folder: Path) -> None:
        """Raises ModelError: files missing or damaged, or quantized in a way that lowrank does not read."""
        files = CheckpointFiles(folder)
        self.config = files.config
        given = files.config.get("quantization_config")
        self.method: str | None = str(given.get("quant_method")) if given else None
        reader = reader_for(given)
        if reader is None:
            self._tensors: dict[str, TensorSource] = dict(files)
            return
        plain, linears = by_linear(reader, files)
        dtype = getattr(torch, str(files.config.get("dtype") or files.config.get("torch_dtype") or "float16"))
        unpacker = _Unpacker(reader)
        self._tensors = {name: files[name] for name in plain}
        for linear, names in linears.items():
            tensors = {suffix: files[name] for suffix, name in names.items()}
            self._tensors[f"{linear}.weight"] = _Unpacked(unpacker, linear, tensors, dtype)

    def __getitem__(self, name: str) -> TensorSource:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Unpacker:
    """Keeps the weight that was asked for last: it is read in blocks of rows, by several threads."""

    def __init__(self, reader: PrequantizedReader) -> None:
        self.reader = reader
        self._last: tuple[str, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def weight(self, linear: str, tensors: Mapping[str, StoredTensor]) -> torch.Tensor:
        """(O, D) float32."""
        with self._lock:  # what is kept is of one linear; without it a thread was given the weight of another's
            if self._last is None or self._last[0] != linear:
                self._last = None
                read = {suffix: tensor.read() for suffix, tensor in tensors.items()}
                try:
                    layer: Any = self.reader.build(linear, read, None, torch.float32)
                except ModelError as error:
                    raise ModelError(f"{next(iter(tensors.values())).file}: {error}") from error
                self._last = linear, layer.dense_weight().clone()
            return self._last[1]


class _Unpacked:
    """The weight of a quantized linear."""

    def __init__(
        self, unpacker: _Unpacker, linear: str, tensors: Mapping[str, StoredTensor], dtype: torch.dtype
    ) -> None:
        self.unpacker, self.linear, self.tensors, self.dtype = unpacker, linear, tensors, dtype
        self.shape = tuple(unpacker.weight(linear, tensors).shape)

    def read(self) -> torch.Tensor:
        """Float32."""
        return self.unpacker.weight(self.linear, self.tensors).clone()

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Float32."""
        return self.unpacker.weight(self.linear, self.tensors)[first:end]

    def blocks(self) -> Iterator[memoryview]:
        """See `TensorSource`."""
        step = max(1, BLOCK_BYTES // (self.shape[1] * self.dtype.itemsize))
        for first in range(0, self.shape[0], step):
            rows = self.rows(first, first + step).to(self.dtype)
            yield rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
