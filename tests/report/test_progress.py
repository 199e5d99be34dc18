"""The time left and the displayed loss, as the views show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank.report.events import JobStarted, RunStarted, StepDone
from tests.report.event_stream import TWO, Clock, loss_of, progress_after, run_events


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
