"""Ask llama.cpp itself what it makes of a GGUF file.

The caches are in float32 and flash attention is off, so that logits of a float32 file agree with transformers'
to rounding (normalized squared error about 1e-12) and a wrong epsilon or rotary base shows; with llama.cpp's
own defaults errors below 1e-7 drown. It lives in a child process, which its assertions may end.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lowrank.errors import ModelError
from lowrank.export.gguf.llama_structures import OTHER_VERSION

Adapters = Sequence[tuple[Path, float]]
"""Adapter files and how strongly each counts."""


class OtherVersionError(ModelError):
    """The installed llama.cpp has other functions or structures than are known here."""


def unreachable() -> str | None:
    """Why llama.cpp cannot be asked here; None: it can."""
    if find_spec("xllamacpp") is None:
        return "llama.cpp is not installed: pip install 'lowrank-llm[gguf]'"
    if sys.platform == "win32":
        return "on Windows the package xllamacpp hides llama.cpp's functions; check the file on Linux or macOS"
    return None


class LlamaCpp:
    """A file (with adapters over it, and a tower's file beside it) loaded by llama.cpp, until the end of the `with`
    block.

    Raises ModelError: not installed, cannot load the file, died on an assertion, or took more than `timeout`
    seconds for one answer.
    """

    def __init__(
        self,
        path: Path,
        *,
        adapters: Adapters = (),
        tower: Path | None = None,
        vocab_only: bool = False,
        threads: int = 1,
        timeout: float = 600.0,
    ) -> None:
        reason = unreachable()
        if reason:
            raise ModelError(reason)
        self._what, self._timeout = f"llama.cpp on {path}", timeout
        self._folder = tempfile.TemporaryDirectory()
        self._stderr_file = Path(self._folder.name, "said")
        with open(self._stderr_file, "wb") as stderr:
            self._process = subprocess.Popen(
                child_command("llama_child"),
                env=child_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        opening = {
            "model": str(path),
            "adapters": [[str(adapter), scale] for adapter, scale in adapters],
            "tower": None if tower is None else str(tower),
            "vocab_only": vocab_only,
            "threads": threads,
        }
        try:
            self.vocabulary_size: int = self._request(opening)
        except ModelError:
            self.close()
            raise

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """After each token, (T, V) float32."""
        array = Path(self._folder.name, "array.npy")
        self._request({"kind": "logits", "tokens": [int(token) for token in tokens], "array": str(array)})
        found = np.load(array)
        array.unlink()
        return found

    def image_logits(
        self, before: Sequence[int], pixels_HWC: np.ndarray, after: Sequence[int], rows: int
    ) -> tuple[np.ndarray, int]:
        """Logits after each of the last `rows` tokens of `after`, which stands behind `before` and a picture, (rows, V)
        float32; and how many tokens the picture is. `pixels_HWC`: (height, width, 3) uint8."""
        array, picture = Path(self._folder.name, "array.npy"), Path(self._folder.name, "picture.npy")
        np.save(picture, pixels_HWC)
        task = {
            "kind": "image_logits",
            "before": [int(token) for token in before],
            "picture": str(picture),
            "after": [int(token) for token in after],
            "rows": rows,
            "array": str(array),
        }
        length = self._request(task)
        found = np.load(array)
        array.unlink()
        return found, length

    def generate(
        self, tokens: Sequence[int], max_tokens: int, stop_tokens: Iterable[int] = ()
    ) -> tuple[list[int], bool]:
        """The likeliest continuation, and whether the model ended it: by the file's own tokens or `stop_tokens`."""
        task = {
            "kind": "generate",
            "tokens": [int(token) for token in tokens],
            "max_tokens": max_tokens,
            "stop_tokens": [int(token) for token in stop_tokens],
        }
        answer = self._request(task)
        return answer["tokens"], answer["stopped"]

    def tokenize(
        self, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = True
    ) -> list[list[int]]:
        """Token ids of each text."""
        task = {"kind": "tokenize", "texts": list(texts), "add_special": add_special, "parse_special": parse_special}
        return self._request(task)

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, task: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        alarm = threading.Timer(self._timeout, self._process.kill)
        alarm.start()
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        late = not alarm.is_alive()
        alarm.cancel()
        if line:
            return json.loads(line)["answer"]
        if late:
            raise ModelError(f"{self._what}: no answer within {self._timeout:.0f} seconds")
        stderr = self._stderr_file.read_text(encoding="utf-8", errors="replace")
        error = OtherVersionError if OTHER_VERSION in stderr else ModelError
        raise error(stderr_tail(self._what, self._process.wait(), stderr))


def run_child(
    module: str, request: dict[str, Any], what: str, received: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Run one of this folder's modules on one request; it prints how far it is, `done total`.

    Raises ModelError with the end of what it said.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            child_command(module),
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with process.stdin, contextlib.suppress(BrokenPipeError):  # it ended early, and has said why
                process.stdin.write(json.dumps(request))
            with process.stdout:
                for line in process.stdout:
                    done, total = line.split()
                    received(int(done), int(total))
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            stderr.seek(0)
            raise ModelError(stderr_tail(what, code, stderr.read().decode("utf-8", errors="replace")))


def child_command(module: str) -> list[str]:
    """This Python on one of this folder's modules."""
    return [sys.executable, "-m", f"{__package__}.{module}"]


def child_environment() -> dict[str, str]:
    """Finds what this process finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def stderr_tail(what: str, code: int, stderr: str) -> str:
    """How a child ended, and the end of what it said."""
    how = f"ended by signal {-code}" if code < 0 else "failed"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    token_stream = [line for line in lines if "error" in line.lower() or "assert" in line.lower()]
    return "\n  ".join([f"{what} {how}:", *list(dict.fromkeys([*token_stream, *lines[-1:]]))[-5:]])


def squared_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Normalized: mean squared difference over the reference's variance along the vocabulary. Shapes (T, V)."""
    wanted = reference.astype(np.float64)
    spread = wanted - wanted.mean(axis=-1, keepdims=True)
    return float(((ours.astype(np.float64) - wanted) ** 2).sum() / (spread**2).sum())
