"""An earlier commit beside this tree, for benchmarks that run both in turns."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Generator
from pathlib import Path

HERE = Path(__file__).parents[1]
"""This tree."""


@contextlib.contextmanager
def checked_out(commit: str, folder: Path) -> Generator[Path]:
    """`folder`, which is not there yet, holds `commit` until the end of the block."""
    subprocess.run(["git", "worktree", "add", "--detach", str(folder), commit], check=True, cwd=HERE)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True, cwd=HERE)
