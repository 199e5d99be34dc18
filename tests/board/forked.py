"""A board's children as forks of one process that has imported everything: the same commands, without the seconds that
each takes to import torch and transformers.

test_kill.py, test_cli.py and test_warm_worker.py have the board start the real programs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from lowrank.board import children
from tests import command_line


@contextmanager
def forked_children() -> Generator[None]:
    """Boards start what they start by forking."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "start", _start)
        patch.setattr(children, "start_warm_worker", _WarmWorker)
        yield


def _start(
    arguments: Sequence[str], *, cwd: Path, out: Path, errors: Path, task: str, more: Mapping[str, str] | None = None
) -> command_line.Child:
    return command_line.start(
        arguments, cwd=cwd, out=out, err=errors, environment=children.environment(task, more), session=True
    )


class _WarmWorker:
    """cli/warm.py in a fork, which is asked and answers through named pipes."""

    def __init__(self, cwd: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            question, answer = (os.path.join(folder, name) for name in ("ask", "answer"))
            os.mkfifo(question)
            os.mkfifo(answer)
            self._child = command_line.start(
                ["warm"], cwd=cwd, stdin=question, out=Path(answer), err=Path(os.devnull), session=True
            )
            self.pid = self._child.pid
            self.stdin: IO[bytes] = os.fdopen(os.open(question, os.O_WRONLY), "wb")
            self.stdout: IO[bytes] = os.fdopen(os.open(answer, os.O_RDONLY), "rb")

    def poll(self) -> int | None:
        """Its exit code, once it is over."""
        return self._child.poll()

    def wait(self) -> int:
        """Until it has ended."""
        return self._child.wait()
