"""Quantises a GGUF file in a process of its own (see quantize.py), which the kernels end where they disagree."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.export.gguf.writer import Entry, library, write_file

ROWS_AT_ONCE = 8 << 20
"""Weights given to one thread at a time."""


class Kernels:
    """llama.cpp's own functions in the shared library at `path`, or numpy's where that is None."""

    def __init__(self, path: Path | None) -> None:
        self.quantise: Any = None
        self._widen: dict[Any, Any] = {}
        if path is not None:
            opened, types = ctypes.CDLL(str(path)), library().GGMLQuantizationType
            self.quantise = opened.ggml_quantize_chunk
            self.quantise.restype = ctypes.c_size_t
            self.quantise.argtypes = [
                ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p,
            ]  # fmt: skip
            self._widen = {types.F16: opened.ggml_fp16_to_fp32_row, types.BF16: opened.ggml_bf16_to_fp32_row}
            for function in self._widen.values():
                function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

    def floats(self, stored: np.ndarray, kind: Any) -> np.ndarray:
        """Values of rows as they are stored, float32."""
        widen = self._widen.get(kind)
        if widen is None or not stored.flags.c_contiguous:
            return library().quants.dequantize(stored, kind)
        out = np.empty(stored.nbytes // 2, dtype=np.float32)
        widen(stored.ctypes.data, out.ctypes.data, len(out))
        return out


def quantise_rows(kernels: Kernels, kind: Any, row_ND: np.ndarray, importance_D: np.ndarray | None) -> np.ndarray:
    """Bytes of float32 rows, (N, bytes of a row)."""
    gguf = library()
    if kernels.quantise is None or kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32):
        return gguf.quants.quantize(row_ND, kind).reshape(len(row_ND), -1).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(row_ND, dtype=np.float32)
    out = np.empty((len(rows), rows.shape[1] // block * size), dtype=np.uint8)
    weights = None if importance_D is None else np.ascontiguousarray(importance_D, dtype=np.float32)
    address = None if weights is None else weights.ctypes.data
    written = kernels.quantise(int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], address)
    assert written == out.nbytes, f"{written} of {out.nbytes} bytes"
    return out


def main() -> None:
    """Read the request from standard input: source, target, the type of each tensor, importance, threads, library."""
    request = json.load(sys.stdin)
    gguf = library()
    reader = gguf.GGUFReader(request["source"])
    types = gguf.GGMLQuantizationType
    kernels = Kernels(Path(request["library"]) if request["library"] else None)
    importance = dict(np.load(request["importance"])) if request["importance"] else {}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries = []
    for name, tensor in tensors.items():
        kind = types[request["types"][name] or tensor.tensor_type.name]
        entries.append(Entry(name, tuple(int(n) for n in reversed(tensor.shape)), kind))

    total = sum(int(tensor.n_elements) for tensor in tensors.values())
    done = 0

    def encoded(entry: Entry) -> Iterator[np.ndarray]:
        nonlocal done
        tensor = tensors[entry.name]
        if tensor.tensor_type == entry.kind:
            yield np.asarray(tensor.data)
        else:
            yield from _quantised(kernels, entry, tensor, importance.get(entry.name), pool)
        done += int(tensor.n_elements)
        print(done, total, flush=True)

    with ThreadPoolExecutor(request["threads"]) as pool:
        data = (encoded(entry) for entry in entries)
        write_file(Path(request["target"]), request["arch"], _fields(reader, request), entries, data)


def _quantised(
    kernels: Kernels, entry: Entry, tensor: Any, importance: np.ndarray | None, pool: ThreadPoolExecutor
) -> Iterator[np.ndarray]:
    """Slabs of rows through the pool, in order. Importance is per matrix: (D) or (experts x D)."""
    width = entry.shape[-1]
    stored = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
    matrices = entry.shape[0] if len(entry.shape) == 3 else 1
    per_matrix = len(stored) // matrices
    weights = None if importance is None else importance.reshape(-1, width)
    step = max(1, ROWS_AT_ONCE // width)

    def slab(place: tuple[int, int]) -> np.ndarray:
        start, end = place
        rows = kernels.floats(stored[start:end], tensor.tensor_type).reshape(end - start, width)
        row = None if weights is None else weights[(start // per_matrix) % len(weights)]
        return quantise_rows(kernels, entry.kind, rows, row)

    places = [
        (matrix * per_matrix + start, matrix * per_matrix + min(start + step, per_matrix))
        for matrix in range(matrices)
        for start in range(0, per_matrix, step)
    ]
    ahead = (os.cpu_count() or 1) + 1
    waiting = [pool.submit(slab, place) for place in places[:ahead]]
    for index in range(len(places)):
        yield waiting.pop(0).result()
        if index + ahead < len(places):
            waiting.append(pool.submit(slab, places[index + ahead]))


def _fields(reader: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The source's header with the new file type."""
    fields = {
        name: value.contents()
        for name, value in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    return {**fields, "general.file_type": request["file_type"], "general.quantization_version": 2}


if __name__ == "__main__":
    main()
