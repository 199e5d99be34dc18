"""What a person sees, fed with whole runs."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from lowrank.report.event_lines import decode
from lowrank.report.events import EvalDone, Notice, Preparing
from lowrank.report.process_memory import MemoryUse
from lowrank.report.reporters import view_for
from lowrank.report.reporters.json_lines import JsonReporter
from lowrank.report.reporters.metrics import MetricsReporter, read_metrics
from lowrank.report.reporters.plain import PlainReporter
from lowrank.report.reporters.scalars import scalars
from lowrank.report.reporters.terminal import LiveView, TerminalReporter
from tests.report.event_stream import TWO, Clock, loss_of, progress_after, report_all, run_events, timed


def test_view_fits_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert isinstance(view_for(console=terminal), TerminalReporter)
    assert isinstance(view_for(console=Console(file=io.StringIO())), PlainReporter)
    assert isinstance(view_for(json=True), JsonReporter)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(view_for(console=Console(file=io.StringIO(), force_terminal=True)), PlainReporter)


def plain(jobs: dict[str, int], quiet: bool = False, **how: Any) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    reporter = PlainReporter(Console(file=stream, width=40), quiet=quiet, clock=clock)
    report_all(timed(run_events(jobs, **how), clock), reporter)
    return stream.getvalue().splitlines()


def test_plain_lines_of_one_job() -> None:
    lines = plain({"only": 10})
    assert lines[0] == "warning: only: 2 rows dropped"
    assert lines[1] == "runs/first · 1 job · cpu, float32"
    logged = [line for line in lines if "tok/s" in line]
    assert [line.split()[1] for line in logged] == ["1/10", "5/10", "10/10"]
    assert "50 tok/s" in logged[1]
    assert "10s left" in logged[1]
    assert f"loss {loss_of('only', 5):.4f}" in logged[1]
    assert "lr 1.0e-04" in logged[1]
    assert any("held-out" in line and "best so far" in line for line in lines)
    assert lines[-1].endswith("only is over: done")


def test_plain_lines_of_many_jobs_are_one_entry_each_and_not_endless() -> None:
    jobs = {f"job-{number}": 10 for number in range(30)}
    lines = plain(jobs)
    assert sum("tok/s" in line for line in lines) == 3
    assert all(sum(f"{name} loss" in line for line in lines) == 3 for name in jobs)
    assert max(len(line) for line in lines) <= 120
    assert not any("\x1b" in line for line in lines)


def test_metrics_of_an_evaluation_and_the_time_before_the_first_step(tmp_path: Path) -> None:
    """A person sees the share of pairs that are right, a file and trackers everything; preparing is not kept."""
    evaluated = EvalDone("a", 20, 0.5, 9.0, True, {"rewards/accuracies": 0.87, "rewards/margins": math.inf})
    *events, finished = run_events({"a": 20})
    whole = [Preparing("reference log-probabilities", 256, 4000, 185.0), *events, evaluated, finished]
    console = Console(file=io.StringIO(), width=200)
    stream = io.StringIO()
    report_all(whole, PlainReporter(console), MetricsReporter(tmp_path), JsonReporter(stream))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reference log-probabilities: 256 of 4000, 3:05 left" in shown
    assert "a held-out 0.5000, 87 % of pairs right  best so far" in shown
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line for line in lines if line["event"] == "eval"][-1]["metrics"] == evaluated.metrics
    assert all(line["event"] != "preparing" for line in lines)
    first = json.loads(stream.getvalue().splitlines()[0])
    assert (first["event"], first["done"], first["total"], first["seconds_left"]) == ("preparing", 256, 4000, 185.0)
    assert scalars(evaluated)["eval/rewards/accuracies"] == 0.87


def test_quiet_shows_warnings_alone() -> None:
    assert plain({"a": 10}, quiet=True, not_finite=(("a", 3),)) == [
        "warning: a: 2 rows dropped",
        "warning: step 3 of a was skipped",
    ]


def test_markup_in_names_and_texts_is_shown_as_it_is() -> None:
    stream = io.StringIO()
    report_all([Notice("use [bold] or [/x]", job="a")], PlainReporter(Console(file=stream)))
    assert stream.getvalue() == "a: use [bold] or [/x]\n"
    stream = io.StringIO()
    report_all(
        [Notice("use [bold] or [/x]", job="a")],
        TerminalReporter(Console(file=stream, force_terminal=True, color_system=None)),
    )
    assert "a: use [bold] or [/x]" in stream.getvalue()


def drawn(jobs: dict[str, int], *, width: int, height: int, color: bool = False, **how: Any) -> str:
    """What the live view looks like after the events, as lines of text."""
    clock = Clock()
    progress = progress_after(run_events(jobs, **how), clock)
    binary = io.BytesIO()
    stream = io.TextIOWrapper(binary, encoding="utf-8")
    console = Console(
        file=stream,
        width=width,
        height=height,
        force_terminal=True,
        color_system="truecolor" if color else None,
        legacy_windows=False,
    )
    notices = [Notice("short"), Notice("a long one " * 12, "warning")]
    console.print(LiveView(progress, notices, MemoryUse(2**30, 2**31), clock.now))
    stream.flush()
    return binary.getvalue().decode("utf-8")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("number", [1, 3, 30])
def test_live_view_fits_the_screen(width: int, number: int) -> None:
    jobs = {f"微调-{index}": 20 + index for index in range(number)}
    lines = drawn(jobs, width=width, height=30, until=7).splitlines()
    assert max(cell_len(line.rstrip()) for line in lines) <= width
    if width >= 60:
        assert len(lines) <= 30
        assert any("微调-0" in line for line in lines)


def test_live_view_says_what_a_person_wants_to_know() -> None:
    text = drawn({"r8": 20, "r64": 12}, width=120, height=30, until=9, not_finite=(("r64", 3),))
    for part in (
        "r8",
        "r64",
        "9/20",
        "9/12",
        "6s left",
        "1 skipped",
        "held-out",
        "100 tok/s",
        "1.1 GB, peak 2.1 GB",
        "14s left",
    ):
        assert part in text, part
    over = drawn({"r8": 5}, width=120, height=30)
    assert "done" in over
    assert "left" not in over


def test_live_view_folds_what_has_no_room_and_keeps_what_runs() -> None:
    jobs = {f"short{index}": 3 for index in range(10)} | {f"long{index}": 20 for index in range(3)}
    text = drawn(jobs, width=100, height=18, until=6)
    assert all(f"long{index}" in text for index in range(3))
    assert "more:" in text
    assert "done" in text


def test_live_view_without_color_or_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[3" in drawn({"a": 9}, width=100, height=20, color=True, until=3)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in drawn({"a": 9}, width=100, height=20, color=True, until=3)


def test_an_old_code_page_gets_question_marks_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for terminal in (True, False):
        binary = io.BytesIO()
        stream = io.TextIOWrapper(binary, encoding="ascii")
        report_all(run_events({"微调": 4}), view_for(console=Console(file=stream, force_terminal=terminal, width=100)))
        stream.flush()
        assert "4/4" in binary.getvalue().decode("ascii")


def test_terminal_reporter_on_a_real_terminal(tmp_path: Path) -> None:
    """Under a pseudo-terminal, with Ctrl-C's handler reporting from wherever it strikes."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    code = """
import signal, threading, time, os
from lowrank.report.events import EvalDone, Notice, Preparing
from lowrank.report.reporters import view_for
from tests.report.event_stream import run_events
view = view_for()
print(type(view).__name__, flush=True)
signal.signal(signal.SIGALRM, lambda *_: view.report(Notice("from a signal handler")))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for event in run_events({"a": 400, "b": 300}, log_every=100):
    view.report(event)
signal.setitimer(signal.ITIMER_REAL, 0)
view.report(Notice("the last word", "warning"))
view.close()
"""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    screen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        screen += part
    os.close(leader)
    assert process.wait(timeout=60) == 0, screen.decode()[-2000:]
    text = screen.decode()
    assert "TerminalReporter" in text
    assert "400/400" in text
    assert "the last word" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is given back


def test_json_lines_are_strict_and_know_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    report_all(timed(run_events(TWO, not_finite=(("a", 7), ("b", 10))), clock), JsonReporter(stream, clock))
    lines = [decode(text) for text in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines][:2] == ["notice", "run_started"]
    last_of_step_5 = [line for line in lines if line["event"] == "step" and line["step"] == 5][-1]
    assert last_of_step_5["seconds_left"] == pytest.approx(22.0)
    assert last_of_step_5["tokens_per_second"] == pytest.approx(100.0)
    assert any(math.isnan(line["loss"]) for line in lines if line["event"] == "step")
