"""Quantizes a GGUF file in a process of its own (see quantize.py), which the kernels end where they disagree."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.export.gguf.header import Header, read_header
from lowrank.export.gguf.writer import TensorEntry, library, write_file

WEIGHTS_AT_ONCE = 1 << 20
"""Given to one thread at a time: what it makes of them, in float32 and packed, stays in the processor's cache."""


class Kernels:
    """llama.cpp's own functions in the shared library at `path`, or numpy's where that is None."""

    def __init__(self, path: Path | None) -> None:
        self.quantize: Any = None
        self._widen: dict[Any, Any] = {}
        if path is not None:
            opened, types = ctypes.CDLL(str(path)), library().GGMLQuantizationType
            self.quantize = opened.ggml_quantize_chunk
            self.quantize.restype = ctypes.c_size_t
            self.quantize.argtypes = [
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


def quantize_rows(kernels: Kernels, kind: Any, row_ND: np.ndarray, importance_D: np.ndarray | None) -> np.ndarray:
    """Bytes of float32 rows, (N, bytes of a row)."""
    gguf = library()
    if kernels.quantize is None or kind in (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32):
        return gguf.quants.quantize(row_ND, kind).reshape(len(row_ND), -1).view(np.uint8)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(row_ND, dtype=np.float32)
    out = np.empty((len(rows), rows.shape[1] // block * size), dtype=np.uint8)
    weights = None if importance_D is None else np.ascontiguousarray(importance_D, dtype=np.float32)
    address = None if weights is None else weights.ctypes.data
    written = kernels.quantize(int(kind), rows.ctypes.data, out.ctypes.data, 0, len(rows), rows.shape[1], address)
    assert written == out.nbytes, f"{written} of {out.nbytes} bytes"
    return out


def main() -> None:
    """Read the request from standard input: source, target, the type of each tensor, importance, threads, library."""
    request = json.load(sys.stdin)
    header = read_header(Path(request["source"]))
    types = library().GGMLQuantizationType
    kernels = Kernels(Path(request["library"]) if request["library"] else None)
    importance = dict(np.load(request["importance"])) if request["importance"] else {}
    stored = [tensor.entry for tensor in header.tensors.values()]
    kinds = [types[request["types"][entry.name] or entry.kind.name] for entry in stored]
    jobs = [_slabs(header, kernels, *pair, importance.get(pair[0].name)) for pair in zip(stored, kinds)]
    total, done = sum(math.prod(entry.shape) for entry in stored), 0

    def counted(slabs: Iterator[np.ndarray], entry: TensorEntry) -> Iterator[np.ndarray]:
        nonlocal done
        yield from slabs
        done += math.prod(entry.shape)
        print(done, total, flush=True)

    with ThreadPoolExecutor(request["threads"]) as pool:
        made = _in_order(pool, chain(*jobs), ahead=2 * request["threads"])
        data = (counted(islice(made, len(each)), entry) for each, entry in zip(jobs, stored))
        entries = [replace(entry, kind=kind) for entry, kind in zip(stored, kinds)]
        changed = {"general.file_type": request["file_type"], "general.quantization_version": 2}
        write_file(Path(request["target"]), header.with_numbers(changed), entries, data)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], np.ndarray]], ahead: int) -> Iterator[np.ndarray]:
    """What the jobs make, in their order; so many of them are begun before the first is asked for."""
    waiting: deque[Future[np.ndarray]] = deque()
    for job in jobs:
        waiting.append(pool.submit(job))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _slabs(
    header: Header, kernels: Kernels, origin: TensorEntry, kind: Any, importance: np.ndarray | None
) -> list[Callable[[], np.ndarray]]:
    """A tensor's bytes as `kind`, some rows to a job. Importance is per matrix: (D) or (experts x D)."""
    stored = header.rows(origin.name)
    if origin.kind == kind:
        return [lambda: stored]
    width = origin.shape[-1]
    matrices = origin.shape[0] if len(origin.shape) == 3 else 1
    per_matrix = len(stored) // matrices
    weights = None if importance is None else importance.reshape(-1, width)
    step = max(1, WEIGHTS_AT_ONCE // width)

    def slab(start: int, end: int) -> np.ndarray:
        rows = kernels.floats(stored[start:end], origin.kind).reshape(end - start, width)
        row = None if weights is None else weights[(start // per_matrix) % len(weights)]
        return quantize_rows(kernels, kind, rows, row)

    return [
        partial(slab, matrix * per_matrix + start, matrix * per_matrix + min(start + step, per_matrix))
        for matrix in range(matrices)
        for start in range(0, per_matrix, step)
    ]


if __name__ == "__main__":
    main()
