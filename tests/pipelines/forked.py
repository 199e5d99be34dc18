"""Ranks and shares as forks of one process that has imported everything: the same commands, without the seconds that
each takes to import torch and transformers. test_processes.py starts the real program, and the slow tests do.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from lowrank.pipelines import processes
from tests import command_line

_NUMBERS = itertools.count(1)


class Forked:
    """What `processes.Child` needs of `subprocess.Popen`."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> None:
        self.environment = environment
        output = folder / str(next(_NUMBERS))
        os.mkfifo(output)
        log.write_text("")
        self._child = command_line.start(arguments, out=output, err=log, environment=environment, session=True)
        self.stdout = output.open(encoding="utf-8", errors="replace")

    @property
    def returncode(self) -> int | None:
        """As soon as it has ended."""
        return self._child.poll()

    def wait(self) -> int:
        """Until it has ended."""
        return self._child.wait()

    def send_signal(self, number: int) -> None:
        """To the process."""
        os.kill(self._child.pid, number)

    def kill(self) -> None:
        """At once."""
        self._child.kill()


@contextmanager
def forked_processes() -> Generator[list[Forked]]:
    """Runs start their processes by forking; the processes so far."""
    started: list[Forked] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:

        def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked:
            started.append(Forked(arguments, log, environment, Path(folder)))
            return started[-1]

        patch.setattr(processes, "start_process", start)
        yield started
