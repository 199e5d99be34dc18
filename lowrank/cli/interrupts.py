"""What an interruption says and does: of a `lowrank train` until training itself listens (train/stop_signal.py), which
may take seconds, and of the other commands.

Nearly all of them pass in imports, where an exception is no way out: a module in C that is being imported may abort.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_before: dict[int, Any] = {}
"""The handlers that were there, while `end_at_once` listens."""


@contextmanager
def end_at_once(output: int, line: str) -> Generator[None, None, None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP write `line` to a file descriptor and end the process with 130."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(output, f"{line}\n".encode())
        os._exit(130)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and not (name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
            _before.setdefault(number, signal.signal(number, end))
    try:
        yield
    finally:
        end_as_usual()


@contextmanager
def interruption_message(what_is_left: Callable[[], str]) -> Generator[None, None, None]:
    """Inside, an interruption tells the person `what_is_left` of the work."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(what_is_left()) from error


def end_as_usual() -> None:
    """From here on there is something that was saved: signals do what they did."""
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, handler)
