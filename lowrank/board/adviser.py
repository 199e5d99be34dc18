"""Answers that need the heavy packages: a command in a warm child of the board, its result as JSON.

The child holds half a gigabyte, so it is ended when nobody has asked for a while and before a run starts. Of two
questions with the same `topic` the newer wins: the older is ended, its asker hears `Superseded`.
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


class Superseded(Exception):
    """A newer question on the same topic was asked."""


@dataclass(frozen=True)
class Advice:
    """What a command said. `content` is the JSON it printed; `{"error": ...}` where it refused."""

    code: int
    content: dict[str, Any]
    notes: str

    @property
    def error(self) -> str | None:
        """The refusal in words, None if there is none."""
        error = self.content.get("error")
        if isinstance(error, dict):
            return str(error.get("message", ""))
        if self.content:
            return None
        return self.notes.strip()[-2000:] or f"exit code {self.code}"


@dataclass
class _Question:
    done: threading.Event = field(default_factory=threading.Event)
    pid: int | None = None
    code: int | None = None
    superseded: bool = False


class Adviser:
    """Asks; starts the child where it is needed. All methods may be called from any thread."""

    def __init__(self, folder: Path, scratch: Path, *, allow_code: bool = False) -> None:
        self._folder, self._scratch, self._allow_code = folder, scratch, allow_code
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._questions: dict[int, _Question] = {}
        self._topics: dict[str, int] = {}
        self._number, self._last_request = 0, time.monotonic()

    def request(self, arguments: Sequence[str], *, topic: str) -> Advice:
        """The command's answer. Raises Superseded."""
        own = [*arguments, *(["--allow-code"] if self._allow_code else [])]
        self._scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            code = self._warm(own, out, err, topic) if hasattr(os, "fork") else self._cold(own, out, err)
            return Advice(code, _last_json(_text(out)), _text(err))

    def warm_up(self) -> None:
        """Have the child import what it needs, since somebody will ask soon."""
        if hasattr(os, "fork"):
            with self._lock:
                self._last_request = time.monotonic()
                self._running()

    def close(self) -> None:
        """End the child; questions that wait hear that they are superseded."""
        with self._lock:
            child, self._child = self._child, None
            for question in self._questions.values():
                question.superseded = True
                _kill(question.pid)
                question.done.set()
            self._questions.clear()
        if child is not None:
            child.kill()
            child.communicate()

    def close_if_idle(self) -> None:
        """End the child if nobody has asked for some minutes."""
        with self._lock:
            idle = not self._questions and time.monotonic() - self._last_request > _IDLE_SECONDS
        if idle:
            self.close()

    def _warm(self, arguments: Sequence[str], out: Path, err: Path, topic: str) -> int:
        question = _Question()
        with self._lock:
            older = self._questions.get(self._topics.get(topic, 0))
            if older is not None:
                older.superseded = True
                _kill(older.pid)
                older.done.set()
            self._number += 1
            number, self._last_request = self._number, time.monotonic()
            self._questions[number], self._topics[topic] = question, number
            child = self._running()
            assert child.stdin is not None
            request = {"id": number, "arguments": list(arguments), "out": str(out), "err": str(err)}
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write((json.dumps(request) + "\n").encode())
                child.stdin.flush()
        try:
            over = question.done.wait(_LONGEST_SECONDS)
            if question.superseded:
                raise Superseded(topic)
            if not over:
                _kill(question.pid)
            return question.code if question.code is not None else 1
        finally:
            with self._lock:
                self._questions.pop(number, None)
                self._last_request = time.monotonic()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._child = children.start_adviser(self._folder)
            threading.Thread(target=self._listen, args=(self._child,), name="adviser", daemon=True).start()
        return self._child

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            reply = json.loads(line)
            with self._lock:
                question = self._questions.get(reply.get("id", 0))
                if question is None:
                    continue
                question.pid = reply.get("pid", question.pid)
                if question.superseded:
                    _kill(question.pid)
                if "code" in reply:
                    question.code = reply["code"]
                    question.done.set()
        with self._lock:  # it died: nobody waits for it any more
            if self._child is child or self._child is None:
                for question in self._questions.values():
                    question.done.set()

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
