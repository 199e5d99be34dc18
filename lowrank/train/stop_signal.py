"""Stop requests: Ctrl-C, SIGTERM, SIGHUP, or a file named `stop` in the run folder.

While there is something to save, the running step ends and the run saves; before that (reading, loading), the run ends
at once by KeyboardInterrupt. The file works where signals do not: from another machine, on Windows, in a container, and
where a parent process ignores SIGINT. It is deleted when it is found. A file that is older than this process is from an
earlier run and is deleted without effect.
"""

from __future__ import annotations

import _thread
import contextlib
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

POLL_SECONDS = 0.5
"""Seconds between two checks for the stop file."""
_IMPORT_SECONDS = 0.1
"""A signal that came during an import is raised again after so many seconds."""
SAVING = "stopping after this step and saving"
_AGAIN = "; press Ctrl-C again to stop at once"


class StopSignal:
    """Context manager that records stop requests: SIGINT, SIGTERM and SIGHUP where it is entered on the main thread,
    and the stop file in any thread."""

    def __init__(self, file: Path | None = None) -> None:
        self.requested = False
        self._file = file
        self._notify: Callable[[str], None] | None = None
        self._by_file = False
        self._notified = False
        self._saved = False
        self._depth = 0
        self._over = threading.Event()
        self._before: dict[int, Any] = {}
        self._old = self._written()
        began = psutil.Process().create_time() - 1.0
        if self._old is not None and self._old >= began:
            self._old = None  # written since this process began, while it was importing

    def __enter__(self) -> StopSignal:
        self._depth += 1
        if self._depth > 1:
            return self
        for number in _numbers():
            try:
                if number == _hang_up() and signal.getsignal(number) is signal.SIG_IGN:
                    continue  # nohup: it is to outlive its terminal
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread
                break
        if self._file is not None:
            threading.Thread(target=self._watch, daemon=True, name="lowrank-stop-file").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth:
            return
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @contextmanager
    def saving(self, push: Callable[[str], None]) -> Generator[None, None, None]:
        """Context in which a request is recorded in `requested` and reported by `push`. After it everything is saved,
        and only a second Ctrl-C has an effect."""
        self._notify = push
        try:
            yield
        finally:
            self._notify, self._saved = None, True

    def poll(self) -> bool:
        """Return whether a stop was requested. Called between steps, in the thread that trains."""
        if self._by_file and not self._notified:
            self._notified = True
            self._delete_file()
            if self._notify is not None:
                self._notify(f"the file {self._file} was found: {SAVING}")
        return self.requested

    def raise_if_requested(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested. Called between the long stages before the first step."""
        if self.requested:
            self._delete_file()
            raise KeyboardInterrupt

    def delete_stale_file(self) -> None:
        """Delete the stop file of an earlier run. Called by the process that holds the run folder's lock."""
        if self._old is not None and self._written() == self._old:
            self._delete_file()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.requested and number == signal.SIGINT
        if self._by_file:
            self._delete_file()
        elif not self.requested and self._notify is not None:
            self._notify(SAVING + (_AGAIN if number == signal.SIGINT else ""))
        self.requested = True
        if again:
            raise KeyboardInterrupt
        if self._notify is None and not self._saved:
            if _importing(frame):
                timer = threading.Timer(_IMPORT_SECONDS, _thread.interrupt_main, [signal.SIGTERM])
                timer.daemon = True
                timer.start()
            else:
                raise KeyboardInterrupt

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            written = self._written()
            if written is None or written == self._old:
                continue
            self._by_file = self.requested = True
            if self._notify is None and not self._saved and signal.SIGINT in self._before:
                _thread.interrupt_main(signal.SIGTERM)  # SIGINT would be a second Ctrl-C
            return

    def _written(self) -> float | None:
        if self._file is None:
            return None
        try:
            return self._file.stat().st_mtime
        except OSError:
            return None

    def _delete_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: one in C may abort the process when an exception meets it there."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _hang_up() -> int | None:
    return getattr(signal, "SIGHUP", None)  # Windows has none


def _numbers() -> list[int]:
    return [number for number in (signal.SIGINT, signal.SIGTERM, _hang_up()) if number is not None]
