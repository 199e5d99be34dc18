"""Child processes that train: start them, receive their events, forward stop requests, and wait for their ends.

Each child writes its events to a pipe (`--json`) and all other output to a log file. Signals reach only the parent,
which forwards stop requests, so a Ctrl-C counts once, however many processes the terminal would have sent it to."""

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

POLL_SECONDS = 0.2
"""Seconds between two checks for a stop request."""
_LAST_LINES = 12
_REPORT_SECONDS = 5.0
"""Seconds that the processes of one run have to end by themselves once one of them has failed."""
ENDED_IN_ORDER = (0, 7, 130)
"""Exit codes of a run that has ended in order: done, a job's loss was not finite, interrupted."""


def train_arguments(file: Path, strict: bool) -> list[str]:
    """Return the arguments of `lowrank` for a process that trains the settings in `file`. What this process was allowed
    (`--allow-code`), the child is."""
    arguments = ["train", str(file), "--json", *(["--strict"] if strict else [])]
    return [*arguments, "--allow-code"] if code_is_allowed() else arguments


def start_process(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start `lowrank <arguments>` with stdout in a pipe and stderr in the file `log`."""
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
            start_new_session=True,  # the terminal's Ctrl-C reaches only the parent, which forwards it
        )


@dataclass
class Child:
    """One child process. `name`: for messages; `folder`: its run folder; `log`: the file of its stderr."""

    name: str
    arguments: Sequence[str]
    folder: Path
    log: Path
    environment: Mapping[str, str]
    code: int | None = None
    """The exit code once it has ended; negative: the signal that killed it."""
    error: str | None = None
    """The error message that it reported."""
    summary: dict[str, Any] | None = field(default=None, repr=False)
    """The summary of its run, once it has ended in order."""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(self, lines: queue.Queue[tuple[Child, str | None]]) -> None:
        """Start the process; each line of its stdout, and None at its end, is put into `lines`."""
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
        """Request it to save and end."""
        if self.process is None or self.code is not None:
            return
        if hasattr(signal, "SIGHUP"):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)
        else:  # Windows knows no such request
            (self.folder / STOP).touch()

    def kill(self) -> None:
        """Kill it."""
        if self.process is not None and self.code is None:
            self.process.kill()

    def output_lines(self) -> list[str]:
        """Return the lines of its log file."""
        with contextlib.suppress(OSError):
            return self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return []

    def stderr_tail(self) -> str:
        """Return its error message, else the last lines of its log, else how it ended."""
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
    all_or_none: bool = False,
) -> Child | None:
    """Start all children and wait until all have ended; return the first that failed, or None. `on_event` is called
    with their events. A stop request is forwarded and reported by `notify`; a second Ctrl-C, or any error here, kills
    them. `all_or_none`: where one fails, the others are killed, since none can continue alone."""
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
                if all_or_none and time.monotonic() > ends_at:
                    for each in children:
                        each.kill()
    except BaseException:
        for child in children:
            child.kill()
        raise
    return failed


def _arriving(lines: queue.Queue[tuple[Child, str | None]], number: int) -> Iterator[tuple[Child | None, str | None]]:
    """Yield the children's lines until the last has ended, and `(None, None)` every `POLL_SECONDS` seconds without
    one."""
    while number:
        try:
            child, line = lines.get(timeout=POLL_SECONDS)
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
