"""Processes of ours that train, seen from the one that started them: their events, their ends, and being asked to stop.

Each writes its events to a pipe (`--json`), and what else it says to a file. Signals come to the parent alone, which
hands on what was asked; so a Ctrl-C is handled once, however many processes a terminal would have sent it to.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowrank.checkpoints.run_folder import STOP
from lowrank.report.event_lines import as_event, decode
from lowrank.report.events import Event
from lowrank.third_party import code_is_allowed
from lowrank.train.stop_signal import StopSignal

LOOKS_EVERY = 0.2
"""Seconds between looks whether somebody asked to stop."""
_LAST_LINES = 12
_REPORT_SECONDS = 5.0
"""Seconds that processes of one run have, once one of them has failed, to end by themselves."""
ENDED_IN_ORDER = (0, 7, 130)
"""Exit codes of a run that has ended as it should: done, a job's loss was not finite, interrupted."""


def train_arguments(file: Path, strict: bool) -> list[str]:
    """The command line of a process that trains the settings in `file`, with what this process was allowed."""
    arguments = ["train", str(file), "--json", *(["--strict"] if strict else [])]
    return [*arguments, "--allow-code"] if code_is_allowed() else arguments


def start_process(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """`lowrank <arguments>`, its output in a pipe, what else it says in a file."""
    with log.open("w", encoding="utf-8") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "lowrank", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C is the parent's to hand on
        )


@dataclass
class Child:
    """One process. `name`: what people call it; `folder`: its run folder; `log`: what it says beside its events."""

    name: str
    arguments: Sequence[str]
    folder: Path
    log: Path
    environment: Mapping[str, str]
    code: int | None = None
    """Its exit code once it has ended; below 0: the signal that killed it."""
    error: str | None = None
    """What it said was wrong."""
    summary: dict[str, Any] | None = field(default=None, repr=False)
    """What its run has come to."""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self, lines: queue.Queue[tuple[Child, str | None]]) -> None:
        """Run `lowrank <words>`; each line of its events, and None at its end, is put into `lines`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = start_process(self.arguments, self.log, {**os.environ, **self.environment})
        threading.Thread(target=self._read, args=(lines,), daemon=True, name=f"lowrank-{self.name}").start()

    def _read(self, lines: queue.Queue[tuple[Child, str | None]]) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                lines.put((self, line))
        self.process.wait()
        lines.put((self, None))

    def stop(self) -> None:
        """Ask it to save and end."""
        if self.process is None or self.code is not None:
            return
        if hasattr(signal, "SIGHUP"):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        else:  # Windows knows no such request
            (self.folder / STOP).touch()

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None and self.code is None:
            self.process.kill()

    def output_lines(self) -> list[str]:
        """What it has said beside its events."""
        with contextlib.suppress(OSError):
            return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return []

    def stderr_tail(self) -> str:
        """What it said was wrong, or the last of what it wrote, or how it ended."""
        if self.error:
            return self.error
        if self.code is not None and self.code < 0:
            with contextlib.suppress(ValueError):
                return f"it was killed ({signal.Signals(-self.code).name})"
        if lines := self.output_lines():
            return "\n".join(lines[-_LAST_LINES:])
        return f"it ended with exit code {self.code}"


def follow(
    children: Sequence[Child],
    on_event: Callable[[Child, Event], None],
    stop_signal: StopSignal,
    notify: Callable[[str], None],
    *,
    together: bool = False,
) -> Child | None:
    """Start them, and return when all have ended; `on_event` is given their events. A request to stop is handed on and
    told; a second Ctrl-C, or any error here, ends them at once. `together`: none can go on without the others. The
    first that failed."""
    lines: queue.Queue[tuple[Child, str | None]] = queue.Queue()
    requested = False
    failed: Child | None = None
    ends_at = math.inf
    try:
        with stop_signal, stop_signal.saving(notify):
            for child in children:
                child.start(lines)
            for child, line in _arriving(lines, len(children)):
                if stop_signal.poll() and not requested:
                    requested = True
                    for each in children:
                        each.stop()
                if child is not None and line is not None:
                    _take(child, line, on_event)
                if child is not None and line is None and child.code not in ENDED_IN_ORDER and failed is None:
                    failed, ends_at = child, time.monotonic() + _REPORT_SECONDS
                if together and time.monotonic() > ends_at:
                    for each in children:
                        each.kill()
    except BaseException:
        for child in children:
            child.kill()
        raise
    return failed


def _arriving(lines: queue.Queue[tuple[Child, str | None]], number: int) -> Iterator[tuple[Child | None, str | None]]:
    """What comes from the children until the last has ended, and now and then nothing."""
    while number:
        try:
            child, line = lines.get(timeout=LOOKS_EVERY)
        except queue.Empty:
            yield None, None
            continue
        if line is None:
            assert child.process is not None
            child.code, number = child.process.returncode, number - 1
        yield child, line


def _take(child: Child, text: str, on_event: Callable[[Child, Event], None]) -> None:
    try:
        line: dict[str, Any] = decode(text)
    except (ValueError, RecursionError):
        return  # a library that prints
    if "event" not in line:
        if "error" in line:
            child.error = str((line["error"] or {}).get("message") or json.dumps(line["error"]))
        elif "jobs" in line:
            child.summary = line
    elif (event := as_event(line)) is not None:
        on_event(child, event)
