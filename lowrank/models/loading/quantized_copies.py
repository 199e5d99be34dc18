"""Which checkpoints `lowrank quantize` has written a copy of, so that a run with the same storage reads that instead.

A note in the cache folder says where the copy lies, under a digest of the original's files, the storage's settings and
the dtype it was packed from. Files are told apart by size, time of change, header and samples at even distances: the
point of a copy is not to read the original again. A file that is moved or fetched anew is packed anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from lowrank.errors import ModelError
from lowrank.kernels.cache_folder import cache_folder
from lowrank.models.loading.checkpoint_files import checkpoint_files

_SAMPLES, _SAMPLE = 64, 4096


def remember_copy(path: str, revision: str | None, storage: Any, dtype: torch.dtype, folder: Path) -> None:
    """`folder` is the checkpoint at `path`, packed so. Says nothing where the cache cannot be written to."""
    note = _note(path, revision, storage, dtype)
    files = sorted(each.name for each in folder.resolve().glob("*.safetensors"))
    text = json.dumps({"folder": str(folder.resolve()), "digest": _digest(folder / name for name in files)})
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_suffix(f".{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(note)
    except OSError:
        return


def find_copy(path: str, revision: str | None, storage: Any, dtype: torch.dtype) -> Path | None:
    """The folder of the copy, if there is one and it is as it was written."""
    try:
        known = json.loads(_note(path, revision, storage, dtype).read_text(encoding="utf-8"))
        folder = Path(known["folder"])
        files = sorted(folder.glob("*.safetensors"))
        return folder if files and _digest(files) == known["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, ModelError):  # whoever reads the original says what is wrong
        return None


def _note(path: str, revision: str | None, storage: Any, dtype: torch.dtype) -> Path:
    settings = json.dumps(storage.model_dump(mode="json"), sort_keys=True)
    key = f"{_digest(map(Path, checkpoint_files(path, revision)))} {settings} {dtype}"
    return cache_folder() / "quantized" / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def _digest(files: Iterable[Path]) -> str:
    digest = blake2b(digest_size=16)
    for file in files:
        found = file.stat()
        size = found.st_size
        digest.update(f"{size} {found.st_mtime_ns}".encode())
        with file.open("rb") as opened:
            header = opened.read(8)
            length = min(int.from_bytes(header, "little"), size, 100 << 20)
            digest.update(header + opened.read(length))
            for sample in range(_SAMPLES):
                opened.seek(size * sample // _SAMPLES)
                digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()
