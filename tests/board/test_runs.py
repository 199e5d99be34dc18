"""Run folders of any origin, and how far a command is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from lowrank.board import state
from lowrank.board.last_line import message_lines
from lowrank.board.places import Places
from lowrank.board.progress import progress_of
from lowrank.board.runs import all_runs, differing, read_run
from lowrank.board.state import Board

pytestmark = pytest.mark.usefixtures("forked")


def write(folder: Path, *, pid: int, started: float, **summary: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    moment = datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")
    marker = {"owned": ["a"], "pid": pid, "host": socket.gethostname(), "started": moment}
    (folder / ".lowrank.json").write_text(json.dumps(marker), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")


def test_the_state_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    now = time.time()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        cases = {
            "running": {"pid": process.pid, "started": now},
            "done": {"pid": process.pid, "started": now - 5, "interrupted": False},
            "stopped": {"pid": 2**22 + 1, "started": now - 5, "interrupted": True},
            "died": {"pid": 2**22 + 1, "started": now},
        }
        for state, about in cases.items():
            write(tmp_path / state, **about)
            assert read_run(state, tmp_path / state).state == state
        write(tmp_path / "another", pid=process.pid, started=now - 3600)  # its number went to a later process
        assert read_run("another", tmp_path / "another").state == "died"
        old = tmp_path / "resumed"
        write(old, pid=process.pid, started=now, interrupted=True)
        os.utime(old / "summary.json", (now - 900, now - 900))  # of the start before
        assert read_run("resumed", old).state == "running"
        process.kill()
    assert read_run("running", tmp_path / "running").state == "died"
    assert read_run("resumed", old).state == "died"  # metrics.jsonl is of this start
    os.utime(old / "metrics.jsonl", (now - 900, now - 900))
    assert read_run("resumed", old).state == "stopped", "a start that ended before its first step left all as it was"


def test_a_run_from_a_terminal_is_listed_and_holds_the_queue(tmp_path: Path) -> None:
    board = Board(Places(tmp_path))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        write(tmp_path / "runs" / "by hand", pid=process.pid, started=time.time())
        assert [(run.name, run.state) for run in all_runs(board.places)] == [("by hand", "running")]
        before = board.fingerprint()
        task = board.queue.add("x", ["no-such-command"])
        board.queue.look()
        assert board.queue.outcome(task).state == "waiting"
        process.kill()
    board.queue.look()
    assert board.queue.outcome(task).state == "running"
    while board.queue.running():
        time.sleep(0.05)
        board.queue.look()
    time.sleep(0.6)
    assert board.fingerprint() != before


def test_no_page_waits_for_a_driver_that_wakes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi takes a second or more where nothing else keeps the driver awake."""
    tool, gate = tmp_path / "nvidia-smi", tmp_path / "gate"
    os.mkfifo(gate)
    tool.write_text(f"#!/bin/sh\nread line < {gate}\necho 'NVIDIA X, 1000, 2000'\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(state, "_GPUS", [-state._GPU_SECONDS, []])
    assert state.gpus() == []  # and did not wait
    assert state.gpus() == []
    gate.write_text("go\n", encoding="utf-8")
    end = time.monotonic() + 60
    while not state.gpus():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert state.gpus() == [{"name": "NVIDIA X", "free": 1000 << 20, "total": 2000 << 20}]


def test_settings_that_differ() -> None:
    one = {"adapter": {"rank": 8}, "seed": 1, "output_dir": "a", "data": {"train": [{"path": "x"}]}, "betas": [1, 2]}
    two = {
        "adapter": {"rank": 8, "alpha": 3},
        "seed": 2,
        "output_dir": "b",
        "data": {"train": [{"path": "y"}]},
        "betas": [1, 2],
    }
    rows = [("seed", [1, 2]), ("data.train.0.path", ["x", "y"]), ("adapter.alpha", [None, 3])]
    assert sorted(differing({"a": one, "b": two})) == sorted(rows)
    jobs = [{"name": "r8", "adapter": {"rank": 8}, "seed": 1}, {"name": "r4", "adapter": {"rank": 4}, "seed": 1}]
    same = [{**job, "seed": 2} for job in jobs]
    assert differing({"a": {**one, "jobs": jobs}, "b": {**one, "seed": 2, "jobs": same}}) == [("seed", [1, 2])]
    assert differing({"a": one}) == []
    assert differing({}) == []


@pytest.mark.parametrize(
    ("drawn", "done", "left"),
    [
        ("warning: x\n\r\x1b[2KAn a ━━━━━━━━━╸━━ 3/12 0:01:05\r\x1b[2KAn a ━━━━━━━━━━╸━━━ 6/12 0:00:30", 0.5, 30),
        ("writing ━━━━━━━━━━━━━━ 45% -:--:--", 0.45, None),
        ("only words", None, None),
    ],
)  # fmt: skip
def test_how_far_a_command_is_that_draws_a_bar(
    tmp_path: Path, drawn: str, done: float | None, left: float | None
) -> None:
    (tmp_path / "errors.txt").write_text(drawn, encoding="utf-8")
    found = progress_of(tmp_path)
    assert found["done"] == done
    assert found["seconds_left"] == left
    assert found["label"] in ("An a", "writing", "only words")


def test_the_log_has_each_bar_once(tmp_path: Path) -> None:
    path = tmp_path / "errors.txt"
    frames = "".join(f"\r\x1b[2K\x1b[1A\x1b[2Ka ━━━━━━━━ {n}/9 0:00:01\nb ━━━━━━━━ {n}/9 0:00:02" for n in range(9))
    path.write_text(f"first\n{frames}\nlast\n", encoding="utf-8")
    assert message_lines(path, 10) == ["first", "a ━━━━━━━━ 8/9 0:00:01", "b ━━━━━━━━ 8/9 0:00:02", "last"]
    (tmp_path / "output.jsonl").write_text(
        '{"event": "step", "step": 3, "tokens_per_second": 5.5, "seconds_left": 9}\n'
        '{"event": "notice", "text": "saving"}\n',
        encoding="utf-8",
    )
    found = progress_of(tmp_path)
    assert (found["step"], found["tokens_per_second"], found["seconds_left"], found["label"]) == (3, 5.5, 9, "saving")


@pytest.mark.parametrize("file", ["config.json", "summary.json", ".lowrank.json"])
def test_a_deep_file_in_a_run_folder_is_no_end_of_the_page(file: str, tmp_path: Path) -> None:
    write(tmp_path / "runs" / "a", pid=2**22 + 1, started=time.time(), interrupted=False)
    (tmp_path / "runs" / "a" / file).write_text("[" * 200_000, encoding="utf-8")
    for run in all_runs(Places(tmp_path)):
        assert run.name == "a"
