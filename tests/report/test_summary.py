"""summary.json: the sums, the best job, and going on after a resume."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

import lowrank
from lowrank.report import formatting
from lowrank.report.events import Event, JobFinished, StepDone
from lowrank.report.summary import SummaryBuilder, best_job
from lowrank.report.summary_view import render_summary
from tests.report.event_stream import loss_of, run_events

TWO = {"a": 20, "b": 12}


def built(events: Iterable[Event], output_dir: Path, previous: dict[str, Any] | None = None) -> SummaryBuilder:
    builder = SummaryBuilder(output_dir, previous)
    for event in events:
        builder.report(event)
    builder.close()
    return builder


def test_sums_per_run_and_per_job(tmp_path: Path) -> None:
    summary = built(run_events(TWO, tmp_path, not_finite=(("b", 12), ("b", 1))), tmp_path).finish()
    assert summary == json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["train_tokens"], summary["train_seconds"]) == (3200, 40.0)  # jobs share the seconds of a step
    assert summary["tokens_per_second"] == 80.0
    assert summary["peak_memory_bytes"] > 10 * 2**20
    assert summary["peak_device_memory_bytes"] is None
    assert summary["versions"]["lowrank"] == lowrank.__version__
    assert {"torch", "transformers", "python", "platform"} <= summary["versions"].keys()
    a, b = summary["jobs"]["a"], summary["jobs"]["b"]
    assert (a["train_tokens"], a["train_seconds"], a["tokens_per_second"]) == (2000, 40.0, 50.0)
    assert (b["train_tokens"], b["train_seconds"], b["skipped_steps"]) == (1200, 24.0, 2)
    assert (b["first_loss"], b["last_loss"]) == (loss_of("b", 2), loss_of("b", 11))  # finite ones
    assert a["best_eval"] == {"step": 4, "loss": loss_of("a", 4) + 0.1}
    assert a["last_eval"] == {"step": 20, "loss": loss_of("a", 20) + 0.1}
    assert (a["steps"], a["num_steps"], a["finished"], a["epochs"]) == (20, 20, "done", 3.0)
    assert a["verdict"]["kind"] == "falling"
    assert b["verdict"]["kind"] == "too_short"
    assert {"summary.json", "loss.png"} == {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("cut", [1, 5, 12, 15])
def test_goes_on_after_a_resume_as_if_it_had_never_stopped(tmp_path: Path, cut: int) -> None:
    whole = built(run_events(TWO, tmp_path), tmp_path).as_dict()
    first = built([*run_events(TWO, tmp_path, until=cut), JobFinished("a", cut, "interrupted")], tmp_path)
    state = json.loads(json.dumps(first.state()))
    assert first.as_dict(interrupted=True)["jobs"]["a"]["finished"] == "interrupted"
    resumed = built(run_events(TWO, tmp_path, first=cut), tmp_path, previous=state).as_dict()
    for summary in (whole, resumed):
        assert summary.pop("peak_memory_bytes") > 0
    assert resumed == whole


def test_peak_survives_a_resume(tmp_path: Path) -> None:
    state = built(run_events(TWO, tmp_path, until=3), tmp_path).state()
    state["peaks"]["host"] = 2**50
    assert built(run_events(TWO, tmp_path, first=3), tmp_path, state).as_dict()["peak_memory_bytes"] == 2**50


def test_seconds_are_counted_once_however_jobs_come_and_go(tmp_path: Path) -> None:
    jobs = {"a": 3, "b": 9, "c": 5, "d": 9}
    assert built(run_events(jobs, tmp_path), tmp_path).as_dict()["train_seconds"] == 18.0


def test_state_is_bounded() -> None:
    builder = SummaryBuilder(Path("x"))
    events = list(run_events({"a": 30_000}, eval_every=1000))
    for event in events:
        builder.report(event)
    assert len(json.dumps(builder.state())) < 100_000


def evaluated(**losses: float | None) -> dict[str, dict[str, Any]]:
    return {name: {"best_eval": None if loss is None else {"loss": loss, "step": 1}} for name, loss in losses.items()}


def configured(*jobs: dict[str, Any]) -> dict[str, Any]:
    return {"jobs": [{"objective": {"type": "sft"}, "data": {"eval": ["e.json"]}, "seed": 1, **job} for job in jobs]}


@pytest.mark.parametrize(
    ("jobs", "config", "best"),
    [
        (evaluated(a=None), configured({}), "a"),
        (evaluated(a=2.0, b=1.0), configured({}, {}), "b"),
        (evaluated(a=2.0, b=1.0), configured({}, {"seed": 2, "data": {"eval": ["e.json"], "train": ["t"]}}), "b"),
        (evaluated(a=2.0, b=None), configured({}, {}), None),
        (evaluated(a=2.0, b=1.0), configured({}, {"objective": {"type": "dpo"}}), None),
        (evaluated(a=2.0, b=1.0), configured({}, {"data": {"eval": ["other.json"]}}), None),
        (
            evaluated(a=2.0, b=1.0),
            configured({"data": {"validation_split": 0.1}}, {"data": {"validation_split": 0.1}}),
            "b",
        ),
        (
            evaluated(a=2.0, b=1.0),
            configured({"data": {"validation_split": 0.1}}, {"data": {"validation_split": 0.1}, "seed": 2}),
            None,
        ),
        (evaluated(a=2.0, b=1.0), {}, None),
    ],
)
def test_best_job_only_among_losses_that_compare(
    jobs: dict[str, Any], config: dict[str, Any], best: str | None
) -> None:
    assert best_job(jobs, config) == best


def shown(summary: dict[str, Any], width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(render_summary(summary))
    return stream.getvalue()


def test_the_end_names_the_best_job_and_what_to_do_next(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    summary = built(run_events(TWO, folder), folder).as_dict()
    text = shown(summary, 160)
    assert f"Best job  {summary['best_job']}, {folder}/{summary['best_job']}/best" in text
    assert f"lowrank chat '{folder}' --adapter {summary['best_job']}" in text
    assert f"{folder}/loss.png" in text
    assert "Too short" not in text.split("Still falling")[0].split("b: ")[0]
    assert all(job["verdict"]["sentence"].split(":")[0] in text for job in summary["jobs"].values())
    interrupted = built(run_events(TWO, folder, until=5), folder).as_dict(interrupted=True)
    assert "resume=true" in shown(interrupted, 160)
    assert "not over" in shown(interrupted, 160)


@pytest.mark.parametrize("number", [1, 6, 7, 30])
@pytest.mark.parametrize("width", [30, 80, 120])
def test_the_end_fits_any_width(tmp_path: Path, number: int, width: int) -> None:
    jobs = {f"微调-{index}": 15 + index for index in range(number)}
    text = shown(built(run_events(jobs, tmp_path), tmp_path).as_dict(), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    if width >= 80:
        assert all(name in text for name in jobs)


def test_a_run_without_one_step_has_a_summary(tmp_path: Path) -> None:
    events = [event for event in run_events(TWO, tmp_path) if not isinstance(event, StepDone)][:2]
    summary = built(events, tmp_path).finish(interrupted=True)
    assert summary["tokens_per_second"] is None
    assert summary["jobs"]["a"]["last_loss"] is None
    assert "0/20" in shown(summary, 100)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (formatting.duration(None), "-"),
        (formatting.duration(59.6), "1:00"),
        (formatting.duration(3599), "59:59"),
        (formatting.duration(7509), "2:05:09"),
        (formatting.duration(101400), "1d 04:10"),
        (formatting.gigabytes(2**20 * 512), "537 MB"),
        (formatting.gigabytes(2**31), "2.1 GB"),
        (formatting.count(12345), "12,345"),
        (formatting.count(4.21e6), "4.2 M"),
        (formatting.loss(float("nan")), "nan"),
        (formatting.loss(12.34567), "12.35"),
        (formatting.loss(0.00001), "1.0e-05"),
        (formatting.loss(0.0), "0.0000"),
        (formatting.rate(8.44), "8.4 tok/s"),
        (formatting.rate(12345.6), "12,346 tok/s"),
    ],
)
def test_wording(described: str, expected: str) -> None:
    assert described == expected


def test_a_jobs_name_keeps_its_line_on_a_narrow_screen() -> None:
    job = {
        "steps": 50, "num_steps": 50, "first_loss": 5.5, "last_loss": 5.4, "tokens_per_second": 10_000.0,
        "best_eval": {"loss": 5.4, "step": 50}, "finished": "done", "skipped_steps": 0,
        "verdict": {"kind": "flat", "sentence": "Flat: so it is.", "step": 1}, "paths": {"best": "x", "last": "x"},
    }  # fmt: skip
    summary = {
        "output_dir": "runs/x", "jobs": {"中文任务": job, "r8": job}, "best_job": None, "train_tokens": 9,
        "train_seconds": 1.0, "tokens_per_second": 9.0, "peak_memory_bytes": 2**30, "peak_device_memory_bytes": None,
        "interrupted": False, "paths": {"plot": "loss.png"},
    }  # fmt: skip
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(render_summary(summary))
    shown = console.export_text()
    assert "中文任务 " in shown
    assert "Curves    runs/x/loss.png" in shown


def test_sizes_are_in_powers_of_ten_wherever_people_read_them() -> None:
    """One run must not be said to need 3.0 GB before and 2.8 GiB after it."""
    binary = re.compile(r"\b[KMGT]iB\b")
    written = (".py", ".js", ".html", ".json")
    files = (path for path in Path(lowrank.__file__).parent.rglob("*") if path.suffix in written)
    assert [path for path in files if binary.search(path.read_text("utf-8"))] == []
