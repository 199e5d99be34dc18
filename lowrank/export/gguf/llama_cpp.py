"""Ask llama.cpp itself what it makes of a GGUF file.

The caches are in float32 and flash attention is off, so that logits of a float32 file agree with transformers'
to rounding (normalised squared error about 1e-12) and a wrong epsilon or rotary base shows; with llama.cpp's
own defaults errors below 1e-7 drown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.errors import ModelError

Adapters = Sequence[tuple[Path, float]]
"""Adapter files and how strongly each counts."""


def unreachable() -> str | None:
    """Why llama.cpp cannot be asked here; None: it can."""
    if find_spec("xllamacpp") is None:
        return "llama.cpp is not installed: pip install 'lowrank[gguf]'"
    if sys.platform == "win32":
        return "on Windows the package xllamacpp hides llama.cpp's functions; check the file on Linux or macOS"
    return None


def ask(
    path: Path,
    tasks: Sequence[dict[str, Any]],
    *,
    length: int = 0,
    adapters: Adapters = (),
    threads: int = 1,
    timeout: float = 600.0,
) -> list[Any]:
    """Several questions about one file, in one child process. `length`: longest sequence of tokens; 0: only words.

    Tasks: `{"kind": "logits", "tokens"}`, `{"kind": "generate", "tokens", "max_tokens"}`,
    `{"kind": "tokenize", "texts", "add_special", "parse_special"}`. Raises ModelError: not installed, cannot load
    the file, died on an assertion, or took more than `timeout` seconds.
    """
    reason = unreachable()
    if reason:
        raise ModelError(reason)
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "answers.npz")
        request = {
            "model": str(path),
            "adapters": [[str(adapter), scale] for adapter, scale in adapters],
            "tasks": list(tasks),
            "length": length,
            "threads": threads,
            "answers": str(answers),
        }
        run_child("llama_child", request, f"llama.cpp on {path}", timeout)
        with np.load(answers) as arrays:
            said = json.loads(arrays["said"].tobytes())
            return [said[str(i)] if str(i) in said else arrays[str(i)] for i in range(len(tasks))]


def run_child(module: str, request: dict[str, Any], what: str, timeout: float | None) -> None:
    """Run one of this folder's modules on a request. Raises ModelError with the end of what it said."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.{module}"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            input=json.dumps(request),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{what}: no answer within {timeout:.0f} seconds") from error
    if done.returncode:
        how = f"ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        last = [line for line in done.stderr.splitlines() if line.strip()][-6:]
        raise ModelError("\n  ".join([f"{what} {how}; it said last:", *last]))


def logits(path: Path, tokens: Sequence[int], *, adapters: Adapters = ()) -> np.ndarray:
    """Logits after each token, (T, V) float32."""
    return ask(path, [{"kind": "logits", "tokens": list(tokens)}], length=len(tokens), adapters=adapters)[0]


def tokenize(
    path: Path, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = True
) -> list[list[int]]:
    """Token ids of each text."""
    task = {"kind": "tokenize", "texts": list(texts), "add_special": add_special, "parse_special": parse_special}
    return ask(path, [task])[0]


def generate(path: Path, tokens: Sequence[int], max_tokens: int, *, adapters: Adapters = ()) -> tuple[list[int], bool]:
    """The likeliest continuation of at most `max_tokens`, and whether the model ended it."""
    task = {"kind": "generate", "tokens": list(tokens), "max_tokens": max_tokens}
    answer = ask(path, [task], length=len(tokens) + max_tokens, adapters=adapters)[0]
    return answer["tokens"], answer["stopped"]


def squared_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Normalised: mean squared difference over the reference's variance along the vocabulary. Shapes (T, V)."""
    wanted = reference.astype(np.float64)
    spread = wanted - wanted.mean(axis=-1, keepdims=True)
    return float(((ours.astype(np.float64) - wanted) ** 2).sum() / (spread**2).sum())
