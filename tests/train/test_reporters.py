"""Views, the metrics file and trackers, fed with whole runs."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from lowrank.errors import ConfigError
from lowrank.train.event_lines import decode, encode
from lowrank.train.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    JobFinished,
    JobStarted,
    Notice,
    Preparing,
    Reporter,
    RunStarted,
    StepDone,
)
from lowrank.train.process_memory import MemoryUse, memory_use
from lowrank.train.progress import RunProgress
from lowrank.train.reporters import known_trackers, recorders_for, view_for
from lowrank.train.reporters.json_lines import JsonReporter
from lowrank.train.reporters.metrics import MetricsReporter, read_metrics
from lowrank.train.reporters.plain import PlainReporter
from lowrank.train.reporters.scalars import scalars
from lowrank.train.reporters.terminal import LiveView, TerminalReporter
from lowrank.train.reporters.terminal import _Sampled as Sampled
from tests.train.event_stream import loss_of, run_events

TWO = {"a": 20, "b": 12}


def feed(events: Iterable[Event], *reporters: Reporter) -> None:
    for event in events:
        for reporter in reporters:
            reporter.report(event)
    for reporter in reporters:
        reporter.close()


class Clock:
    """Ticks by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed(events: Iterable[Event], clock: Clock, *, between: float = 0.0) -> Iterator[Event]:
    """The clock moves by a step's seconds when the first job reports it, and `between` on every evaluation."""
    reported: set[str] = set()
    for event in events:
        if isinstance(event, StepDone):
            if not reported or event.job in reported:
                reported = set()
                clock.now += event.seconds
            reported.add(event.job)
        elif type(event).__name__ == "EvalDone":
            clock.now += between
        yield event


def progress_after(events: Iterable[Event], clock: Clock, **how: float) -> RunProgress:
    progress = RunProgress()
    for event in timed(events, clock, **how):
        progress.consume(event, clock.now)
    return progress


# --- time left -------------------------------------------------------------------------------------------------------


def test_time_left_of_jobs_that_end_on_their_own() -> None:
    """Both cost 1 s a step together 2 s; b has 7 steps left, a 15: 7 * 2 + 8 * 1 seconds."""
    clock = Clock()
    progress = progress_after(run_events(TWO, until=5), clock)
    assert progress.tokens_per_second == pytest.approx(100.0)
    assert progress.seconds_left(clock.now) == pytest.approx(22.0)
    assert progress.seconds_left(clock.now, "b") == pytest.approx(14.0)
    assert progress.seconds_left(clock.now, "a") == pytest.approx(22.0)
    assert progress.seconds_left(clock.now + 1.5) == pytest.approx(20.5)


def test_time_left_after_a_resume_counts_only_this_process() -> None:
    clock = Clock()
    progress = progress_after(run_events({"a": 1000}, first=900, until=903, seconds=3.0), clock)
    assert progress.elapsed(clock.now) == pytest.approx(9.0)
    assert progress.seconds_left(clock.now) == pytest.approx(97 * 3.0)


def test_time_left_is_calm_about_one_slow_step_and_knows_evaluations() -> None:
    clock = Clock()
    events = list(run_events({"a": 100}, until=40, eval_every=10))
    slow = next(event for event in events if isinstance(event, StepDone))
    events[events.index(slow)] = StepDone(**{**vars(slow), "seconds": 500.0})
    assert progress_after(events, clock).seconds_left(clock.now) == pytest.approx(60 * 2.0)
    clock = Clock()
    left = progress_after(run_events({"a": 100}, until=41, eval_every=10), clock, between=30.0).seconds_left(clock.now)
    assert left == pytest.approx(59 * (2.0 + 3.0), rel=0.01)


def test_time_left_before_the_first_step_and_at_the_end() -> None:
    clock = Clock()
    progress = progress_after(list(run_events(TWO))[:2], clock)
    assert progress.seconds_left(clock.now) is None
    assert progress_after(run_events(TWO), clock).seconds_left(clock.now) == 0.0
    resumed = RunStarted(
        Path("x"),
        (JobStarted("a", 5, 5, 1.0, 1), JobStarted("b", 9, 4, 1.0, 1, "", "early_stopping")),
        {},
        "cpu",
        "float32",
    )
    progress = progress_after([resumed], clock)
    assert progress.seconds_left(clock.now) == 0.0
    assert [job.state for job in progress.jobs.values()] == ["done", "early_stopping"]


def test_a_job_that_silently_takes_no_steps_does_not_hold_the_others() -> None:
    clock = Clock()
    both = [event for event in run_events({"a": 20, "b": 20}, until=6) if getattr(event, "job", "a") == "a"]
    progress = progress_after(both, clock)
    assert progress.round_complete
    assert progress.seconds_left(clock.now) == pytest.approx(14 * 2.0)


def test_displayed_loss_is_smooth_and_survives_nan() -> None:
    progress = progress_after(run_events({"a": 20}, not_finite=(("a", 3), ("a", 20))), Clock())
    job = progress.jobs["a"]
    assert job.skipped == 2
    assert job.loss == pytest.approx(sum(loss_of("a", step) for step in range(12, 20)) / 8, abs=0.15)


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------

NOT_FINITE = (("a", 7), ("b", 10))


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_metrics_hold_everything_logged(tmp_path: Path) -> None:
    feed(run_events(TWO, not_finite=NOT_FINITE), MetricsReporter(tmp_path))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps = [(line["job"], line["step"]) for line in lines if line["event"] == "step"]
    assert sorted(steps) == sorted(
        [("a", 1), ("a", 5), ("a", 7), ("a", 10), ("a", 15), ("a", 20), ("b", 1), ("b", 5), ("b", 10), ("b", 12)]
    )
    assert [line["step"] for line in lines if line["event"] == "eval" and line["job"] == "b"] == [4, 8, 12]
    assert [(line["job"], line["step"]) for line in lines if line["event"] == "notice"] == [
        ("a", 0),
        ("a", 7),
        ("b", 10),
    ]
    bad = next(line for line in lines if line["event"] == "step" and line["step"] == 7)
    assert math.isnan(bad["loss"])
    assert bad["grad_norm"] == math.inf
    assert bad["metrics"] == {"rewards/margin.mean": -math.inf}
    assert bad["skipped"]
    assert all("time" in line for line in lines)


def test_metrics_are_strict_json_and_zero_is_kept(tmp_path: Path) -> None:
    reporter = MetricsReporter(tmp_path)
    events = list(run_events({"微调": 3}, not_finite=(("微调", 2),)))
    events = [StepDone(**{**vars(e), "loss": 0.0}) if isinstance(e, StepDone) and e.step == 3 else e for e in events]
    feed(events, reporter)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    texts = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    lines = [json.loads(text, parse_constant=refuse) for text in texts]
    steps = {line["step"]: line for line in lines if line["event"] == "step"}
    assert steps[3]["loss"] == 0.0
    assert steps[2]["loss"] is None
    assert steps[2]["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "metrics": {"rewards/margin.mean": "-inf"}}


@pytest.mark.parametrize("checkpoint", [1, 4, 7, 10, 12, 15])
@pytest.mark.parametrize("crash", [0, 2, 5])
def test_metrics_after_a_resume_equal_an_uninterrupted_runs(tmp_path: Path, checkpoint: int, crash: int) -> None:
    feed(run_events(TWO, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "whole"))
    feed(run_events(TWO, until=checkpoint + crash, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "cut"))
    if crash:
        with open(tmp_path / "cut/metrics.jsonl", "a") as file:
            file.write('{"event": "step", "job": "a", "st')  # torn
    feed(run_events(TWO, first=checkpoint, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "cut"))
    assert without_times(tmp_path / "cut/metrics.jsonl") == without_times(tmp_path / "whole/metrics.jsonl")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_an_interruption_leaves_nothing_but_its_notice(tmp_path: Path) -> None:
    stop = [Notice("stopping", "warning"), JobFinished("a", 6, "interrupted"), CheckpointSaved(6, tmp_path)]
    feed([*run_events({"a": 9}, until=6), *stop], MetricsReporter(tmp_path / "cut"))
    feed(run_events({"a": 9}, first=6), MetricsReporter(tmp_path / "cut"))
    feed(run_events({"a": 9}), MetricsReporter(tmp_path / "whole"))
    cut = without_times(tmp_path / "cut/metrics.jsonl")
    notice = {"event": "notice", "job": None, "step": 6, "level": "warning", "text": "stopping"}
    assert cut.pop(cut.index(notice)) == notice
    assert cut == without_times(tmp_path / "whole/metrics.jsonl")


def test_a_longer_run_drops_the_end_of_the_shorter(tmp_path: Path) -> None:
    feed(run_events({"a": 10}), MetricsReporter(tmp_path / "cut"))
    feed(run_events({"a": 20}, first=10), MetricsReporter(tmp_path / "cut"))
    ends = [line["step"] for line in read_metrics(tmp_path / "cut/metrics.jsonl") if line["event"] == "job_finished"]
    assert ends == [20]


def test_a_fresh_run_starts_an_empty_file_and_nothing_is_touched_before(tmp_path: Path) -> None:
    feed(run_events({"old": 5}), MetricsReporter(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    reporter = MetricsReporter(tmp_path)
    events = list(run_events({"new": 5}))
    reporter.report(events[0])
    reporter.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "other").exists()
    feed([Notice("early")], MetricsReporter(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    feed(events, MetricsReporter(tmp_path))
    assert {line["job"] for line in read_metrics(tmp_path / "metrics.jsonl")} == {"new"}


def test_every_line_is_on_disk_when_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from lowrank.train.reporters.metrics import MetricsReporter
from tests.train.event_stream import run_events
reporter = MetricsReporter(Path({str(tmp_path)!r}))
for event in run_events({{"a": 50}}, until=33, log_every=1):
    reporter.report(event)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -signal.SIGKILL
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "step"]
    assert steps == list(range(1, 34))


def test_lines_survive_odd_texts() -> None:
    line = {
        "event": "notice",
        "text": "a\u2028b\nc\x85 微 \"'",
        "metrics": {"a.b/c": math.nan, "d": {"e": -math.inf}},
        "x": 1.5,
    }
    text = encode(line)
    assert "\n" not in text
    again = decode(text)
    assert math.isnan(again["metrics"].pop("a.b/c"))
    del line["metrics"]["a.b/c"]
    assert again == line
    with pytest.raises(ValueError, match="JSON object"):
        decode("[1]")


def test_metrics_with_odd_texts_are_read_back(tmp_path: Path) -> None:
    events = list(run_events({"a": 3}))
    feed([*events[:2], Notice("a\u2028b", job="a"), *events[2:]], MetricsReporter(tmp_path))
    assert [line["text"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "notice"][
        1
    ] == "a\u2028b"


# --- views -----------------------------------------------------------------------------------------------------------


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
    feed(timed(run_events(jobs, **how), clock), reporter)
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
    feed(whole, PlainReporter(console), MetricsReporter(tmp_path), JsonReporter(stream))
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
    feed([Notice("use [bold] or [/x]", job="a")], PlainReporter(Console(file=stream)))
    assert stream.getvalue() == "a: use [bold] or [/x]\n"
    stream = io.StringIO()
    feed(
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
        "1.0 GiB, peak 2.0 GiB",
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


def test_live_view_without_colour_or_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[3" in drawn({"a": 9}, width=100, height=20, color=True, until=3)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in drawn({"a": 9}, width=100, height=20, color=True, until=3)


def test_an_old_code_page_gets_question_marks_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for terminal in (True, False):
        binary = io.BytesIO()
        stream = io.TextIOWrapper(binary, encoding="ascii")
        feed(run_events({"微调": 4}), view_for(console=Console(file=stream, force_terminal=terminal, width=100)))
        stream.flush()
        assert "4/4" in binary.getvalue().decode("ascii")


def test_terminal_reporter_on_a_real_terminal(tmp_path: Path) -> None:
    """Under a pseudo-terminal, with Ctrl-C's handler reporting from wherever it strikes."""
    pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
    code = """
import signal, threading, time, os
from lowrank.train.events import Notice
from lowrank.train.reporters import view_for
from tests.train.event_stream import run_events
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
    feed(timed(run_events(TWO, not_finite=NOT_FINITE), clock), JsonReporter(stream, clock))
    lines = [decode(text) for text in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines][:2] == ["notice", "run_started"]
    last_of_step_5 = [line for line in lines if line["event"] == "step" and line["step"] == 5][-1]
    assert last_of_step_5["seconds_left"] == pytest.approx(22.0)
    assert last_of_step_5["tokens_per_second"] == pytest.approx(100.0)
    assert any(math.isnan(line["loss"]) for line in lines if line["event"] == "step")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_measured_and_its_peak_is_this_programs_own() -> None:
    used = memory_use()
    assert 10 * 2**20 < used.now <= used.peak
    assert used.device_now is None
    code = "from lowrank.train.process_memory import memory_use; import sys; print(memory_use().peak)"
    block = bytearray(used.now + 2**29)  # a large parent must not count for its child
    block[::4096] = b"x" * len(block[::4096])
    assert memory_use().peak >= len(block)
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert child < len(block)


def test_sampling_is_rare() -> None:
    calls: list[str] = []

    def measure(device: str) -> MemoryUse:
        calls.append(device)
        return MemoryUse(1, 2)

    sampled = Sampled(measure, every=60.0)
    assert [sampled("cpu"), sampled("cpu"), sampled("cpu")] == [MemoryUse(1, 2)] * 3
    assert calls == ["cpu"]


# --- trackers --------------------------------------------------------------------------------------------------------


def scalars_of(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return [(each.step, each.value) for each in read.Scalars(tag)]


def test_tensorboard_reads_our_curves_also_after_a_resume(tmp_path: Path) -> None:
    def trackers() -> list[Reporter]:
        return recorders_for(tmp_path, ["tensorboard"])

    feed(run_events(TWO, tmp_path, until=11), *trackers())
    feed(run_events(TWO, tmp_path, first=7), *trackers())
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["a", "b"]
    losses = scalars_of(tmp_path / "tensorboard" / "a", "train/loss")
    assert losses == [(step, pytest.approx(loss_of("a", step), rel=1e-6)) for step in (1, 5, 10, 15, 20)]
    held_out = scalars_of(tmp_path / "tensorboard" / "a", "eval/loss")
    assert [step for step, _ in held_out] == [4, 8, 12, 16, 20]
    assert scalars_of(tmp_path / "tensorboard" / "b", "train/rewards/margin.mean")[0] == (1, 0.5)


def test_missing_packages_are_named_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert known_trackers() == ["mlflow", "swanlab", "tensorboard", "wandb"]
    for name in ("wandb", "mlflow", "swanlab"):  # as if not installed, wherever this runs
        monkeypatch.setitem(sys.modules, name, None)
    names = ["wandb", "tensorboard", "mlflow", "swanlab", "tensorbord", "no_such_module:Thing"]
    with pytest.raises(ConfigError) as caught:
        recorders_for(tmp_path / "run", names)
    message = str(caught.value)
    for name in ("wandb", "mlflow", "swanlab"):
        assert f"pip install 'lowrank[{name}]'" in message
    assert "did you mean 'tensorboard'?" in message
    assert "no_such_module" in message
    assert not (tmp_path / "run").exists()


def test_extras_have_the_names_of_the_trackers() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    extras = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    assert all(f"\n{name} = " in extras for name in known_trackers())


class Collecting:
    """A third party's reporter."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def report(self, event: Event) -> None: ...

    def close(self) -> None: ...


def test_third_parties_reporters_are_found_by_name(tmp_path: Path) -> None:
    found = recorders_for(tmp_path, [f"{__name__}:Collecting"])
    assert type(found[-1]).__name__ == "Collecting"
    assert isinstance(found[0], MetricsReporter)
