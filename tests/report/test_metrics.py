"""`metrics.jsonl`, fed with whole runs."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowrank.report.event_lines import decode, encode
from lowrank.report.events import CheckpointSaved, JobFinished, Notice, StepDone
from lowrank.report.reporters.metrics import MetricsReporter, read_metrics
from tests.report.event_stream import TWO, report_all, run_events

NOT_FINITE = (("a", 7), ("b", 10))


def without_times(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").split("\n") if text]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_metrics_hold_everything_logged(tmp_path: Path) -> None:
    report_all(run_events(TWO, not_finite=NOT_FINITE), MetricsReporter(tmp_path))
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
    report_all(events, reporter)

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
    report_all(run_events(TWO, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "whole"))
    report_all(run_events(TWO, until=checkpoint + crash, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "cut"))
    if crash:
        with open(tmp_path / "cut/metrics.jsonl", "a") as file:
            file.write('{"event": "step", "job": "a", "st')  # torn
    report_all(run_events(TWO, first=checkpoint, not_finite=NOT_FINITE), MetricsReporter(tmp_path / "cut"))
    assert without_times(tmp_path / "cut/metrics.jsonl") == without_times(tmp_path / "whole/metrics.jsonl")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_an_interruption_leaves_nothing_but_its_notice(tmp_path: Path) -> None:
    stop = [Notice("stopping", "warning"), JobFinished("a", 6, "interrupted"), CheckpointSaved(6, tmp_path)]
    report_all([*run_events({"a": 9}, until=6), *stop], MetricsReporter(tmp_path / "cut"))
    report_all(run_events({"a": 9}, first=6), MetricsReporter(tmp_path / "cut"))
    report_all(run_events({"a": 9}), MetricsReporter(tmp_path / "whole"))
    cut = without_times(tmp_path / "cut/metrics.jsonl")
    notice = {"event": "notice", "job": None, "step": 6, "level": "warning", "text": "stopping"}
    assert cut.pop(cut.index(notice)) == notice
    assert cut == without_times(tmp_path / "whole/metrics.jsonl")


def test_a_longer_run_drops_the_end_of_the_shorter(tmp_path: Path) -> None:
    report_all(run_events({"a": 10}), MetricsReporter(tmp_path / "cut"))
    report_all(run_events({"a": 20}, first=10), MetricsReporter(tmp_path / "cut"))
    ends = [line["step"] for line in read_metrics(tmp_path / "cut/metrics.jsonl") if line["event"] == "job_finished"]
    assert ends == [20]


def test_a_fresh_run_starts_an_empty_file_and_nothing_is_touched_before(tmp_path: Path) -> None:
    report_all(run_events({"old": 5}), MetricsReporter(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    reporter = MetricsReporter(tmp_path)
    events = list(run_events({"new": 5}))
    reporter.report(events[0])
    reporter.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert not (tmp_path / "other").exists()
    report_all([Notice("early")], MetricsReporter(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    report_all(events, MetricsReporter(tmp_path))
    assert {line["job"] for line in read_metrics(tmp_path / "metrics.jsonl")} == {"new"}


def test_every_line_is_on_disk_when_killed(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
from pathlib import Path
from lowrank.report.reporters.metrics import MetricsReporter
from tests.report.event_stream import run_events
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


@pytest.mark.parametrize(
    "text", ["[" * 100_000, *(json.dumps({"x": 1, "nonfinite": each}) for each in (3, {"x": {"y": "nan"}}, {"x": [1]}))]
)
def test_lines_of_strangers_are_passed_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{text}\n{{"x": 2}}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"x": 2}]


def test_metrics_with_odd_texts_are_read_back(tmp_path: Path) -> None:
    events = list(run_events({"a": 3}))
    report_all([*events[:2], Notice("a\u2028b", job="a"), *events[2:]], MetricsReporter(tmp_path))
    assert [line["text"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "notice"][
        1
    ] == "a\u2028b"
