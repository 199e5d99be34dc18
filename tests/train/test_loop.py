"""The loop: jobs end on their own, for their own reasons; interrupts save."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.report.events import CheckpointSaved, EvalDone, Event, JobFinished, Notice, StepDone
from lowrank.segments import Segment
from lowrank.train.engine import Engine
from lowrank.train.job import Job
from lowrank.train.loop import Loop
from lowrank.train.schedule import ScheduleConfig
from tests.tiny_models import make_base, make_engine, random_step


@dataclass
class Endless:
    """A feed whose data depend on the seed and the step alone."""

    seed: int
    taken: int = 0
    hook: Callable[[int], None] = lambda step: None

    @property
    def epoch(self) -> float:
        return self.taken / 10

    def next_step(self) -> list[Segment]:
        self.hook(self.taken)
        self.taken += 1
        return random_step(1000 * self.seed + self.taken, [9, 5, 14])

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


@dataclass
class Notes:
    """A checkpointer that notes what it was asked to write, and the weights at that moment."""

    engine: Engine
    kept: list[tuple[str, str, int]] = field(default_factory=list)
    weights: dict[tuple[str, str], list[torch.Tensor]] = field(default_factory=dict)
    checkpoints: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def save_adapter(self, job: Job, which: str) -> Path:
        self.kept.append((job.name, which, job.progress.step))
        self.weights[job.name, which] = _weights(self.engine, job.slot)
        return Path(job.name) / which

    def checkpoint(self, iteration: int, jobs: Sequence[Job]) -> Path:
        self.checkpoints.append((iteration, tuple(job.progress.step for job in jobs)))
        return Path(str(iteration))


def _weights(engine: Engine, slot: int) -> list[torch.Tensor]:
    return [value.detach().clone() for value in engine.bank.parameters(slot).values()]


@dataclass
class World:
    """A loop over jobs `a`, `b`, ... and everything it said."""

    loop: Loop
    engine: Engine
    notes: Notes
    events: list[Event]

    def of(self, kind: type, job: str) -> list[Any]:
        return [
            event for event in self.events if isinstance(event, kind) and getattr(event, "job", None) in (job, None)
        ]


def world(
    *jobs: dict[str, Any], save_every: int | None = None, on_event: Callable[[Event], None] = lambda event: None
) -> World:
    engine, slots = make_engine(make_base("llama"), *[LoraConfig(rank=2)] * len(jobs), max_grad_norm=None)
    events: list[Event] = []
    own = [
        Job(
            **{
                "name": "abcdef"[index],
                "slot": slot,
                "dataloader": Endless(index),
                "held_out": (),
                "schedule": ScheduleConfig(type="constant"),
                "learning_rate": 1e-2,
                "num_steps": 6,
                "eval_every": None,
                "log_every": 1,
                "max_skipped_steps": 2,
                "patience": None,
                **settings,
            }
        )
        for index, (slot, settings) in enumerate(zip(slots, jobs))
    ]
    notes = Notes(engine)

    def report(event: Event) -> None:
        events.append(event)
        on_event(event)

    return World(Loop(engine, own, notes, report, save_every=save_every), engine, notes, events)


def poison(engine: Engine, slot: int) -> None:
    """From now on nothing finite comes out of this slot."""
    with torch.no_grad():
        for parameter in engine.bank.parameters(slot).values():
            parameter.fill_(float("nan"))


def test_jobs_of_different_length_end_independently() -> None:
    """The shorter one's weights stay those it ended with; the longer one does not notice its end."""
    w = world({"num_steps": 3}, {"num_steps": 7})
    assert w.loop.run()
    assert [len(w.of(StepDone, name)) for name in "ab"] == [3, 7]
    ends = [(event.job, event.step, event.reason) for event in w.events if isinstance(event, JobFinished)]
    assert ends == [("a", 3, "done"), ("b", 7, "done")]
    assert w.notes.kept == [("a", "last", 3), ("a", "best", 3), ("b", "last", 7), ("b", "best", 7)]
    for now, then in zip(_weights(w.engine, 0), w.notes.weights["a", "last"]):
        assert torch.equal(now, then)
    other = world({"num_steps": 7}, {"num_steps": 7})
    other.loop.run()
    losses = [[event.loss for event in each.of(StepDone, "b")] for each in (w, other)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_a_finished_job_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world({"num_steps": 2}, {"num_steps": 4})
    tokens: list[int] = []
    hidden = w.engine.base.hidden
    watched = lambda batch, **how: tokens.append(batch.num_tokens) or hidden(batch, **how)  # noqa: E731
    monkeypatch.setattr(w.engine.base, "hidden", watched)
    w.loop.run()
    assert tokens == [56, 56, 28, 28]


def test_a_job_that_is_not_finite_stops_after_so_many_in_a_row_and_the_others_go_on() -> None:
    w = world({"max_skipped_steps": 2}, {})
    poison(w.engine, 0)
    assert w.loop.run()
    assert [event.skipped for event in w.of(StepDone, "a")] == [True] * 3
    assert [event.skipped for event in w.of(StepDone, "b")] == [False] * 6
    ends = [(event.job, event.step, event.reason) for event in w.events if isinstance(event, JobFinished)]
    assert ends == [("a", 3, "not_finite"), ("b", 6, "done")]
    warnings = [event for event in w.events if isinstance(event, Notice) and event.level == "warning"]
    assert [event.job for event in warnings] == ["a"] * 3
    assert "step 2 of a gave a loss or gradient that is not finite" in warnings[1].text
    assert "(2 in a row, the job stops after 3)" in warnings[1].text
    healthy = world({}, {})
    healthy.loop.run()
    losses = [[event.loss for event in each.of(StepDone, "b")] for each in (w, healthy)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_skips_that_are_not_in_a_row_do_not_stop_a_job() -> None:
    w = world({"num_steps": 9, "max_skipped_steps": 1})
    good = _weights(w.engine, 0)

    def hook(step: int) -> None:  # every other step is spoilt
        with torch.no_grad():
            if step % 2:
                poison(w.engine, 0)
            else:
                for parameter, value in zip(w.engine.bank.parameters(0).values(), good):
                    parameter.copy_(value)

    w.loop.jobs[0].dataloader.hook = hook
    assert w.loop.run()
    progress = w.loop.jobs[0].progress
    assert (progress.finished, progress.step, progress.skipped) == ("done", 9, 4)


def test_no_skip_allowed() -> None:
    w = world({"max_skipped_steps": 0}, {})
    poison(w.engine, 0)
    w.loop.run()
    assert len(w.of(StepDone, "a")) == 1


def test_evaluations_best_and_early_stopping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best adapter is kept when it is the best; patience counts evaluations without gain."""
    held_out = tuple(random_step(3, [8, 12]))
    w = world({"held_out": held_out, "num_steps": 40, "eval_every": 2, "patience": 3}, {"num_steps": 20})
    scripted = iter([3.0, 2.0, 2.5, 1.0, 1.0, 1.5, float("nan"), 0.5])
    evaluate = w.engine.evaluate

    def scripted_losses(work: Any) -> Any:
        result = evaluate(work)
        return {slot: type(r)(next(scripted), r.tokens, r.totals) for slot, r in result.items()}

    monkeypatch.setattr(w.engine, "evaluate", scripted_losses)
    assert w.loop.run()
    evaluations = w.of(EvalDone, "a")
    assert [(event.step, event.best) for event in evaluations] == [
        (2, True), (4, True), (6, False), (8, True), (10, False), (12, False), (14, False)
    ]  # fmt: skip
    assert w.loop.jobs[0].progress.finished == "early_stopping"
    assert (w.loop.jobs[0].progress.best_step, w.loop.jobs[0].progress.best_loss) == (8, 1.0)
    assert [entry for entry in w.notes.kept if entry[0] == "a"] == [
        ("a", "best", 2), ("a", "best", 4), ("a", "best", 8), ("a", "last", 14)
    ]  # fmt: skip
    assert len(w.of(StepDone, "b")) == 20


def test_held_out_rows_are_looked_at_when_due_and_at_the_end() -> None:
    held_out = tuple(random_step(3, [8, 12]))
    w = world(
        {"held_out": held_out, "num_steps": 5, "eval_every": 2},
        {"held_out": held_out, "num_steps": 4, "eval_every": None},
        {"num_steps": 3, "eval_every": 1},
    )
    w.loop.run()
    steps = {name: [event.step for event in w.of(EvalDone, name)] for name in "abc"}
    assert steps == {"a": [2, 4, 5], "b": [4], "c": []}
    expected = w.engine.evaluate({0: held_out})[0]
    last = w.of(EvalDone, "a")[-1]
    assert last.loss == expected.loss
    assert last.tokens == expected.totals["tokens"]


def test_checkpoints_when_due_and_at_the_end() -> None:
    w = world({"num_steps": 5}, {"num_steps": 2}, save_every=2)
    w.loop.run()
    assert w.notes.checkpoints == [(2, (2, 2)), (4, (4, 2)), (5, (5, 2))]
    assert [event.step for event in w.events if isinstance(event, CheckpointSaved)] == [2, 4, 5]


def test_logged_steps() -> None:
    w = world({"num_steps": 7, "log_every": 3})
    w.loop.run()
    assert [event.step for event in w.of(StepDone, "a") if event.logged] == [1, 3, 6, 7]
    assert [event.epoch for event in w.of(StepDone, "a")] == pytest.approx([i / 10 for i in range(1, 8)])


def test_an_interrupt_ends_after_the_step_and_saves() -> None:
    """A real signal in the middle of a step; a run that goes on from there has the same losses as one in one go."""

    def interrupt(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    w = world({"dataloader": Endless(0, hook=interrupt)}, {"num_steps": 2})
    assert w.loop.run() is False
    assert signal.getsignal(signal.SIGINT) is before
    assert len(w.of(StepDone, "a")) == 3
    assert w.notes.checkpoints == [(3, (3, 2))]
    ends = [(event.job, event.step, event.reason) for event in w.events if isinstance(event, JobFinished)]
    assert ends == [("b", 2, "done"), ("a", 3, "interrupted")]
    assert any("press Ctrl-C again" in event.text for event in w.events if isinstance(event, Notice))
    rest = Loop(w.engine, w.loop.jobs, w.notes, w.events.append, save_every=None, iteration=w.loop.iteration)
    assert rest.run()
    whole = world({}, {"num_steps": 2})
    whole.loop.run()
    assert [event.loss for event in w.of(StepDone, "a")] == [event.loss for event in whole.of(StepDone, "a")]


def test_a_second_interrupt_stops_at_once() -> None:
    def interrupt(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    w = world({"dataloader": Endless(0, hook=interrupt)})
    with pytest.raises(KeyboardInterrupt):
        w.loop.run()
    assert signal.getsignal(signal.SIGINT) is before
    assert len(w.of(StepDone, "a")) == 1


def test_an_interrupt_while_somebody_reports_is_told_afterwards() -> None:
    """A reporter that is in the middle of a line is not called again from within."""
    depth, deepest = 0, 0

    def on_event(event: Event) -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        if isinstance(event, StepDone) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        depth -= 1

    w = world({}, on_event=on_event)
    assert w.loop.run() is False
    assert any("press Ctrl-C again" in event.text for event in w.events if isinstance(event, Notice))
    assert deepest == 1


def test_runs_in_a_thread() -> None:
    """Where signals cannot be caught."""
    w = world({})
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(w.loop.run()))
    thread.start()
    thread.join()
    assert done == [True]


def test_nothing_left_to_do() -> None:
    """A resumed run whose jobs are all over."""
    w = world({})
    w.loop.run()
    again = Loop(w.engine, w.loop.jobs, w.notes, w.events.append, save_every=None, iteration=6)
    assert again.run()
    assert len(w.of(StepDone, "a")) == 6
