"""Commands that need the heavy packages, run by a prewarmed child process of the board; their results are JSON.

The worker holds half a gigabyte, so it is ended after some minutes without a request and before a run starts. Of two
requests with the same `topic` the newer wins: the older is ended, and its `run` raises `Superseded` once it is over,
because its files lie in a folder that is deleted then.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.board import children

_IDLE_SECONDS = 180.0
_LONGEST_SECONDS = 900.0
_KILLED_SECONDS = 10.0


class Superseded(Exception):
    """A newer request on the same topic has come."""


@dataclass(frozen=True)
class WorkerResult:
    """What a command returned. `content`: the JSON it printed, `{"error": ...}` if it failed; `notes`: its stderr."""

    code: int
    content: dict[str, Any]
    notes: str

    @property
    def error(self) -> str | None:
        """The message of the error, None if there is none."""
        error = self.content.get("error")
        if isinstance(error, dict):
            return str(error.get("message", ""))
        if self.content:
            return None
        return self.notes.strip()[-2000:] or f"exit code {self.code}"


@dataclass
class _Request:
    child: subprocess.Popen[bytes]
    """The worker that was asked."""
    done: threading.Event = field(default_factory=threading.Event)
    pid: int | None = None
    code: int | None = None
    superseded: bool = False


class WarmWorker:
    """The worker process, started by the first request. All methods may be called from any thread."""

    def __init__(self, folder: Path, scratch: Path, *, allow_code: bool = False) -> None:
        self._folder, self._scratch, self._allow_code = folder, scratch, allow_code
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._requests: dict[int, _Request] = {}
        self._topics: dict[str, int] = {}
        self._number, self._last_request = 0, time.monotonic()

    def run(self, arguments: Sequence[str], *, topic: str) -> WorkerResult:
        """Run a command in a fork of the worker and return its result. Raises Superseded."""
        own = [*arguments, *(["--allow-code"] if self._allow_code else [])]
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self._warm(own, out, err, topic) if hasattr(os, "fork") else self._cold(own, out, err)
            return WorkerResult(code, _last_json(_text(out)), _text(err))

    def warm_up(self) -> None:
        """Start the worker, which takes seconds to import what it needs, before the first request."""
        if hasattr(os, "fork"):
            with self._lock:
                self._last_request = time.monotonic()
                self._running()

    def close(self) -> None:
        """End the worker; requests that wait raise Superseded."""
        with self._lock:
            self._end_child()
            for request in self._requests.values():
                request.superseded = True
                request.done.set()
            self._requests.clear()

    def close_if_idle(self) -> None:
        """End the worker after some minutes without a request."""
        with self._lock:
            idle = not self._requests and time.monotonic() - self._last_request > _IDLE_SECONDS
        if idle:
            self.close()

    def _warm(self, arguments: Sequence[str], out: Path, err: Path, topic: str) -> int:
        with self._lock:
            older = self._requests.get(self._topics.get(topic, 0))
            if older is not None:
                older.superseded = True
                _kill(older.pid)  # if it is not known yet, `_listen` kills it
            child = self._running()
            request = _Request(child)
            self._number += 1
            number, self._last_request = self._number, time.monotonic()
            self._requests[number], self._topics[topic] = request, number
            assert child.stdin is not None
            line = {"id": number, "arguments": list(arguments), "out": str(out), "err": str(err)}
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write((json.dumps(line) + "\n").encode())
                child.stdin.flush()
        try:
            over = request.done.wait(_LONGEST_SECONDS)
            if request.superseded:
                raise Superseded(topic)
            if not over:
                _kill(request.pid)
                request.done.wait(_KILLED_SECONDS)
            return request.code if request.code is not None else 1
        finally:
            with self._lock:
                self._requests.pop(number, None)
                self._last_request = time.monotonic()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is not None:
            self._end_child()
        if self._child is None:
            self._child = children.start_warm_worker(self._folder)
            threading.Thread(target=self._listen, args=(self._child,), name="warm worker", daemon=True).start()
        return self._child

    def _end_child(self) -> None:
        """Kill the worker with its forks, of which one may have begun that it has not told of. `_listen` closes its
        output."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # it began a session
        child.wait()
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout:
            for line in child.stdout:
                reply = json.loads(line)
                with self._lock:
                    request = self._requests.get(reply.get("id", 0))
                    if request is None:
                        continue
                    request.pid = reply.get("pid", request.pid)
                    if request.superseded:
                        _kill(request.pid)
                    if "code" in reply:
                        request.code = reply["code"]
                        request.done.set()
        with self._lock:  # it died: nobody waits for it any more
            if self._child is child:
                self._end_child()
            for request in self._requests.values():
                if request.child is child:
                    request.done.set()

    def _cold(self, arguments: Sequence[str], out: Path, err: Path) -> int:
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            try:
                return subprocess.run(
                    children.command(arguments),
                    cwd=self._folder,
                    stdout=stdout,
                    stderr=stderr,
                    timeout=_LONGEST_SECONDS,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return 1


def _kill(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _last_json(text: str) -> dict[str, Any]:
    """The object a command printed: over many lines, or on the last of several."""
    for part in (text, text.strip().rpartition("\n")[2]):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}
