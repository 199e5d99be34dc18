"""Processes the board starts, and how they are found again after the board itself was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TASK = "LOWRANK_BOARD_TASK"
"""Environment variable of a child: the task it does."""


@dataclass(frozen=True)
class Identity:
    """A process, not to be mistaken for a later one with the same number: when it began is part of it.

    `started` is in clock ticks since the machine started (Linux), else in seconds since 1970.
    """

    pid: int
    started: float

    def as_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"pid": self.pid, "started": self.started}

    @staticmethod
    def read(content: Mapping[str, Any]) -> Identity:
        """From a file."""
        return Identity(int(content["pid"]), float(content["started"]))

    @staticmethod
    def of(pid: int) -> Identity | None:
        """Of a process that lives."""
        started = _started(pid)
        return None if started is None else Identity(pid, started)

    @property
    def lives(self) -> bool:
        """Whether it still runs. One that ended but was not waited for does not."""
        started = _started(self.pid)
        return started is not None and abs(started - self.started) < 2


def start(
    arguments: Sequence[str], *, cwd: Path, out: Path, errors: Path, task: str, more: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """`lowrank arguments` with its output in files: nothing of it hangs on the board or on a page.

    `more` are further environment variables.
    """
    with open(out, "ab") as stdout, open(errors, "ab") as stderr:
        return subprocess.Popen(
            command(arguments),
            cwd=cwd,
            env=environment(task, more),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C in the board's terminal is the board's alone
        )


def environment(task: str, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the child that does a task is given."""
    return {
        **os.environ,
        **(more or {}),
        TASK: task,
        "PYTHONSAFEPATH": "1",  # `-m` would look for modules in the folder first
        "PYTHONUNBUFFERED": "1",
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "TTY_COMPATIBLE": "1",  # rich then draws its progress bars, which last_line.py reads
        "TTY_INTERACTIVE": "1",
    }


def start_warm_worker(cwd: Path) -> subprocess.Popen[bytes]:
    """The process that has imported what commands need (cli/warm.py)."""
    return subprocess.Popen(
        [sys.executable, "-m", "lowrank.cli.warm"],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", "NO_COLOR": "1", "COLUMNS": "120"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def command(arguments: Sequence[str]) -> list[str]:
    """The argument list that runs this lowrank."""
    return [sys.executable, "-m", "lowrank", *arguments]


def request_stop(identity: Identity) -> None:
    """SIGTERM: `train` saves a checkpoint and ends, other commands end."""
    _send(identity, signal.SIGTERM)


def kill(identity: Identity) -> None:
    """At once, for what does not end by itself."""
    _send(identity, getattr(signal, "SIGKILL", signal.SIGTERM))


def find(task: str) -> Identity | None:
    """The child that does a task, if the board was killed between starting it and noting its number."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(TASK) == task and process.status() != psutil.STATUS_ZOMBIE:
                return Identity.of(process.pid)
        except (psutil.Error, OSError):
            continue
    return None


def _send(identity: Identity, number: int) -> None:
    if identity.lives:
        try:
            os.kill(identity.pid, number)
        except ProcessLookupError:
            return


def _started(pid: int) -> float | None:
    """When a living process began; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except (OSError, IndexError):
        if sys.platform == "linux":
            return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
