"""Processes of ours as they are really started: `python -m lowrank`, events in a pipe, the rest in a file."""

from __future__ import annotations

import queue
from pathlib import Path

from lowrank import __version__
from lowrank.pipelines.processes import Child


def lines_of(child: Child) -> list[str]:
    """The lines that it has written until it ended."""
    lines: queue.Queue[tuple[Child, str | None]] = queue.Queue()
    child.start(lines)
    written = []
    while (line := lines.get(timeout=60)[1]) is not None:
        written.append(line)
    assert child.process is not None
    child.code = child.process.returncode
    return written


def test_what_it_writes_and_how_it_ends(tmp_path: Path) -> None:
    good = Child("rank 0", ["--version"], tmp_path, tmp_path / "logs" / "0.log", {})
    (line,) = lines_of(good)
    assert __version__ in line
    assert (good.code, good.output_lines()) == (0, [])
    bad = Child("rank 1", ["--versio"], tmp_path, tmp_path / "logs" / "1.log", {})
    assert lines_of(bad) == []
    assert bad.code == 2
    assert "--versio" in bad.stderr_tail()
