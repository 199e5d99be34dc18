"""Safetensors files of any size, written in one pass with no more than a block of a tensor in memory."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lowrank.export import ExportProgress
from lowrank.export.merge.merged import Merged, MergedTensor, row_ranges
from lowrank.models.loading.checkpoint_files import DTYPE_NAMES, INDEX, SINGLE

_WORKERS = min(4, os.cpu_count() or 1)
_SYNCED_BYTES = 64 << 20
_ALIGNMENT = 8
"""safetensors pads its header with blanks so that tensors begin at multiples of 8."""


@dataclass(frozen=True)
class Layout:
    """Which tensors go to which file."""

    files: tuple[tuple[str, tuple[str, ...]], ...]
    """(file name, names of the tensors in it, in order)."""
    total_bytes: int
    """Of all tensors."""


def lay_out(merged: Merged, dtype: torch.dtype | None, max_shard_size: int) -> Layout:
    """Tensors in the base's order; a file is full when the next would exceed `max_shard_size` bytes.

    A tensor that is larger gets a file of its own, as with transformers.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, plan in merged.items():
        size = num_bytes(plan, dtype)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
        total += size
    if len(shards) == 1:
        return Layout(((SINGLE, tuple(shards[0])),), total)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    return Layout(tuple((file, tuple(names)) for file, names in zip(files, shards)), total)


def written_dtype(plan: MergedTensor, dtype: torch.dtype | None) -> torch.dtype:
    """`dtype` for floats of 16 bits and more; None, and all else, keeps what the base has."""
    return dtype if dtype is not None and plan.dtype.is_floating_point and plan.dtype.itemsize > 1 else plan.dtype


def num_bytes(plan: MergedTensor, dtype: torch.dtype | None) -> int:
    """What a tensor takes in a file."""
    return torch.Size(plan.shape).numel() * written_dtype(plan, dtype).itemsize


def write_shards(
    merged: Merged,
    layout: Layout,
    dtype: torch.dtype | None,
    folder: Path,
    progress: ExportProgress,
    *,
    named: Callable[[str], str] = str,
) -> None:
    """Write the files of `layout`, and their index if there are several. `named`: what a tensor is called there.

    Blocks are merged by a few threads a little ahead of the one that writes; a tensor that is needed whole is alone in
    memory.
    """
    done, threads = 0, torch.get_num_threads()
    with ThreadPoolExecutor(_WORKERS, initializer=partial(torch.set_num_threads, 1)) as pool:
        for file, names in layout.files:
            with _to_disk(folder / file) as out:
                out.write(_header({named(name): merged[name] for name in names}, dtype))
                for name, size in _ahead(pool, _jobs(merged, names, dtype), out):
                    done += size
                    progress(done, layout.total_bytes, name)
    torch.set_num_threads(threads)
    if len(layout.files) > 1:
        weight_map = {named(name): file for file, names in layout.files for name in names}
        index = {"metadata": {"total_size": layout.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Job:
    """Some bytes of a file: made by `make`, or `copied` as they are."""

    name: str
    make: Callable[[], memoryview] | None = None
    copied: Iterable[memoryview] = ()
    alone: bool = False
    """Nothing is made meanwhile: it is as large as a tensor, or only passed on."""


def _jobs(merged: Merged, names: Sequence[str], dtype: torch.dtype | None) -> Iterator[_Job]:
    for name in names:
        wanted, plan = written_dtype(merged[name], dtype), merged[name]
        if merged.is_unchanged(name, wanted):
            yield _Job(name, copied=merged.checkpoint[plan.origin].blocks(), alone=True)
            continue
        for first, end in row_ranges(plan):
            alone = plan.change is not None and not plan.change.by_rows
            yield _Job(name, make=partial(_bytes, merged, name, first, end, wanted), alone=alone)


def _ahead(pool: ThreadPoolExecutor, jobs: Iterator[_Job], out: ToDisk) -> Iterator[tuple[str, int]]:
    """Write every job's bytes in order; the name and the size of each."""
    waiting: deque[tuple[str, Future[memoryview]]] = deque()

    def write_first() -> tuple[str, int]:
        name, made = waiting.popleft()
        block = made.result()
        out.write(block)
        return name, len(block)

    for job in jobs:
        while waiting and (job.alone or len(waiting) > 2 * _WORKERS):
            yield write_first()
        for block in job.copied:
            out.write(block)
            yield job.name, len(block)
        if job.make is not None:
            waiting.append((job.name, pool.submit(job.make)))
        if job.alone and waiting:
            yield write_first()
    while waiting:
        yield write_first()


def _bytes(merged: Merged, name: str, first: int, end: int, dtype: torch.dtype) -> memoryview:
    rows = merged.block(name, first, end, dtype)
    return rows.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(plans: Mapping[str, MergedTensor], dtype: torch.dtype | None) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, plan in plans.items():
        size = num_bytes(plan, dtype)
        kind = DTYPE_NAMES[written_dtype(plan, dtype)]
        fields[name] = {"dtype": kind, "shape": list(plan.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class ToDisk:
    """A file whose bytes go to the disk while more are made; else all of them would be waited for at the end."""

    def __init__(self, file: FileIO, syncing: ThreadPoolExecutor) -> None:
        self._file, self._syncing = file, syncing
        self._unsynced = 0
        self._sync: Future[None] | None = None

    def write(self, block: bytes | memoryview) -> None:
        """Write the whole of `block`, which a single system call may not. OSError where the disk is full."""
        left = memoryview(block)
        while left:
            left = left[self._file.write(left) :]
        self._unsynced += len(block)
        if self._unsynced >= _SYNCED_BYTES:
            self._unsynced = 0
            self.check()
            self._sync = self._syncing.submit(os.fsync, self._file.fileno())

    def check(self) -> None:
        """Wait for what was begun. Raises OSError for what the disk did not take, which it tells only once."""
        if self._sync is not None:
            self._sync.result()


@contextmanager
def _to_disk(path: Path) -> Generator[ToDisk, None, None]:
    with FileIO(path, "w") as file, ThreadPoolExecutor(1) as syncing:
        out = ToDisk(file, syncing)
        yield out
        out.check()
