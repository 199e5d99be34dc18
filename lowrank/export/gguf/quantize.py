"""A GGUF file of 16 or 32 bits to the types people run, with llama.cpp's own kernels and recipes."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.checkpoints.atomic import new_file
from lowrank.errors import ModelError, did_you_mean, raise_all
from lowrank.export.gguf.header import read_header
from lowrank.export.gguf.llama_cpp import run_child
from lowrank.export.gguf.mixes import BASES, choose_types, describe, needs_importance
from lowrank.export.gguf.writer import library

WITHOUT_KERNELS = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16"}
"""What the package gguf can quantize by itself, in numpy."""

Importance = Mapping[str, np.ndarray]
"""Mean square of each input channel of a tensor, by its name in the file: (D), or (experts, D)."""


@dataclass(frozen=True)
class Written:
    """What a quantized file really holds."""

    path: Path
    recipe: str
    kinds: dict[str, int]
    """Matrices of each type."""
    bits_per_weight: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.kinds.items(), key=lambda pair: -pair[1]))
        size = self.path.stat().st_size / 1e6
        return f"{self.path.name}: {size:.1f} MB, {self.bits_per_weight:.2f} bits per weight ({kinds})"


def check_recipe(name: str) -> str:
    """The recipe in llama.cpp's spelling. Raises ModelError for one that does not exist."""
    if name.upper() not in BASES:
        raise ModelError(f"there is no GGUF type {name!r}{did_you_mean(name.lower(), [key.lower() for key in BASES])}")
    return name.upper()


def quantize_file(
    source: Path,
    target: Path,
    recipe: str,
    *,
    importance: Importance | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Written:
    """Write `source` (f32, f16 or bf16) as `recipe` to `target`. `progress(weights done, weights in all)`.

    Raises ModelError: no such type, a type that needs an importance matrix without one, kernels not reachable.
    """
    recipe = check_recipe(recipe)
    header = read_header(source)
    arch = header.fields["general.architecture"]
    shapes = {name: tensor.entry.shape for name, tensor in header.tensors.items()}
    chosen = choose_types(recipe, describe(arch, header.fields, shapes), shapes, importance is not None)
    kernels, notes = _kernels(), []
    if kernels is None:
        raise_all(ModelError, f"quantizing {source.name}", missing_kernels([recipe]))
        chosen = {name: _simple(kind, recipe) for name, kind in chosen.items()}
        notes.append("llama.cpp's kernels cannot be reached here: all but q8_0, q4_0, q4_1, q5_0, q5_1 became q8_0")
    lacking = [name for name in needs_importance(chosen) if importance is None or name not in importance]
    if lacking:
        raise ModelError(
            f"{recipe.lower()} needs an importance matrix for {len(lacking)} tensors ({', '.join(lacking[:3])}, ...): "
            "give texts to measure it on (--importance), or take q3_k_s or larger"
        )
    with tempfile.TemporaryDirectory() as folder, new_file(target) as partial:
        weights = Path(folder, "importance.npz")
        if importance is not None:
            arrays: dict[str, Any] = dict(importance)
            np.savez(weights, **arrays)
        request = {
            "source": str(source),
            "target": str(partial),
            "types": chosen,
            "importance": str(weights) if importance is not None else None,
            "threads": threads or os.cpu_count() or 1,
            "library": str(kernels) if kernels else None,
            "file_type": int(library().LlamaFileType[f"MOSTLY_{recipe}"]),
        }
        run_child("quantize_child", request, f"quantizing {source.name} to {recipe}", progress)
    return Written(target, recipe, *_contents(target), tuple(notes))


def missing_kernels(recipes: Sequence[str]) -> list[str]:
    """Recipes that cannot be made here, one sentence each."""
    if _kernels() is not None:
        return []
    known = ", ".join(name.lower() for name in sorted(WITHOUT_KERNELS - {"F16"}))
    return [
        f"{name.lower()} needs llama.cpp's kernels, out of reach here (pip install 'lowrank-llm[gguf]'; not on "
        f"Windows); "
        f"possible without: {known}"
        for name in recipes
        if BASES[check_recipe(name)] not in WITHOUT_KERNELS
    ]


def _simple(kind: str | None, recipe: str) -> str | None:
    if kind is None or kind in WITHOUT_KERNELS:
        return kind
    return "Q8_0"


def _kernels() -> Path | None:
    """The shared library with llama.cpp in it."""
    found = find_spec("xllamacpp")
    if found is None or found.origin is None:
        return None
    return next(iter(sorted(Path(found.origin).parent.glob("xllamacpp*.so"))), None)


def _contents(path: Path) -> tuple[dict[str, int], float]:
    """Matrices of each type, and bits per weight."""
    entries = [tensor.entry for tensor in read_header(path).tensors.values()]
    kinds = Counter(entry.kind.name for entry in entries if len(entry.shape) > 1)
    weights = sum(math.prod(entry.shape) for entry in entries)
    return dict(kinds), 8 * sum(entry.bytes for entry in entries) / weights
