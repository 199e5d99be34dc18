"""Points of metrics.jsonl: all of them, none twice, spikes kept, and again when the file is another."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowrank.board.curves import After, Curves, thin
from lowrank.report.event_lines import as_line, encode
from lowrank.report.events import EvalDone, StepDone
from lowrank.report.reporters.metrics import read_metrics


def step(job: str, number: int, loss: float) -> str:
    """A line as a run writes it."""
    done = StepDone(
        job=job, step=number, epoch=0.1, loss=loss, grad_norm=1.0, learning_rate=1e-4, tokens=10, loss_tokens=5.0,
        seconds=0.1, skipped=False, metrics={}, logged=True,
    )  # fmt: skip
    return encode(as_line(done, step=number, time=1.0)) + "\n"


def held_out(job: str, number: int, loss: float) -> str:
    done = EvalDone(
        job=job, step=number, loss=loss, tokens=9.0, best=True, metrics={"exact_match": 50.0}, metric="exact_match"
    )
    return encode(as_line(done, step=number, time=1.0)) + "\n"


def test_lines_as_a_run_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    curves = Curves(path)
    curves.read()
    assert curves.thinned() == (curves.position, {})
    lines = [step("a", 1, 2.0), step('b "x\\', 1, math.nan), held_out("a", 1, 1.5), step("a", 2, math.inf)]
    path.write_text("".join(lines), encoding="utf-8")
    curves.read()
    _, found = curves.thinned()
    assert found["a"]["steps"] == [1, 2]
    assert found["a"]["losses"] == [2.0, None]
    assert found["a"]["held_out"] == [1.5]
    assert found['b "x\\']["losses"] == [None]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_every_point_comes_once_whatever_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "".join(step("a", number, number / 10) for number in range(1, 40)).encode()
    curves, position, received = Curves(path), "", []
    for end in range(0, len(text) + 97, 97):  # written in pieces that end anywhere
        path.write_bytes(b"") if not end else None
        with open(path, "r+b") as file:  # the same file, grown
            file.truncate()
            file.write(text[:end])
        curves.read()
        after = curves.after(position or curves.position)
        assert not after.anew
        received += [point for _, point in after.points]
        position = after.position
    assert [point["step"] for point in received] == list(range(1, 40))
    assert curves.thinned()[1]["a"]["steps"] == list(range(1, 40))


def test_no_point_comes_twice_or_never_while_others_read(tmp_path: Path) -> None:
    """Two pages and the queue look at one run while it is written; a page loads, and follows from where it is."""
    path, most = tmp_path / "metrics.jsonl", 3000
    path.write_text("", encoding="utf-8")
    curves, over = Curves(path), threading.Event()

    def write() -> None:
        with open(path, "a", encoding="utf-8", buffering=1) as file:
            for number in range(1, most + 1):
                file.write(step("a", number, 1.0))
        over.set()

    def look() -> None:
        while not over.is_set():
            curves.read()

    threads = [threading.Thread(target=each) for each in (write, look, look)]
    for thread in threads:
        thread.start()
    while not curves.thinned()[1]:
        curves.read()
    position, drawn = curves.thinned(most=most)
    received = list(drawn["a"]["steps"])
    while len(received) < most:
        curves.read()
        after = curves.after(position)
        position = after.position
        received += [point["step"] for _, point in after.points]
    for thread in threads:
        thread.join()
    assert received == list(range(1, most + 1))


def test_another_file_under_the_name_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step("a", 1, 1.0) + step("a", 2, 1.0), encoding="utf-8")
    curves = Curves(path)
    curves.read()
    before = curves.position
    new = tmp_path / "new"
    new.write_text(step("a", 1, 1.0), encoding="utf-8")
    new.replace(path)
    curves.read()
    assert curves.thinned()[1]["a"]["steps"] == [1]
    assert curves.after(before) == After(curves.position, anew=True)
    for nonsense in ("", "x", "1-", "1-x", f"{before}9"):
        assert curves.after(nonsense).anew


def test_thinning_keeps_spikes_and_ends(tmp_path: Path) -> None:
    from array import array

    steps = array("d", range(100_000))
    values = array("d", [1.0] * 100_000)
    values[34_567], values[34_568], values[99_000] = 50.0, -3.0, math.nan
    kept = thin(steps, values, -math.inf, math.inf, 1000)
    assert len(kept) <= 1000
    assert {0, 34_567, 34_568, 99_999} <= set(kept)
    assert thin(steps, values, 10, 20, 1000) == list(range(10, 21))
    assert thin(array("d"), array("d"), 0, 1, 10) == []


def test_a_long_run_is_read_fast(tmp_path: Path) -> None:
    """Three times as fast as json reads the same lines, in processor time (100,000 points: docs/log.md)."""
    path = tmp_path / "metrics.jsonl"
    line = step("job", 1, 1.0)
    path.write_text("".join(line.replace('"step": 1', f'"step": {number}') for number in range(20_000)), "utf-8")

    def ours() -> dict[str, Any]:
        curves = Curves(path)
        curves.read()
        return curves.thinned()[1]

    def theirs() -> None:
        for each in path.read_bytes().splitlines():
            json.loads(each)

    took = {work: min(seconds(work) for _ in range(3)) for work in (ours, theirs)}
    assert 3 * took[ours] < took[theirs]
    found = ours()
    assert found["job"]["points"] == 20_000
    assert len(found["job"]["steps"]) <= 1200


def seconds(work: Callable[[], object]) -> float:
    """Of a processor."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def test_lines_across_pieces_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank.board.curves._PIECE", 100)
    path = tmp_path / "metrics.jsonl"
    note = json.dumps({"event": "notice", "job": None, "text": "x" * 1000, "level": "warning"}) + "\n"
    path.write_text("".join(step("a", number, 1.0) + note for number in range(9)) + step("a", 9, 1.0)[:-1], "utf-8")
    curves = Curves(path)
    curves.read()
    assert curves.thinned()[1]["a"]["steps"] == list(range(9))
    assert len(curves.notices) == 9
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n")
    curves.read()
    assert curves.thinned()[1]["a"]["steps"] == list(range(10))


def test_lines_of_other_writers_are_read_as_well(tmp_path: Path) -> None:
    """Other order, no losses, no steps: as json reads them."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"loss": 1.0, "step": 1, "job": "a", "event": "step"},
        {"event": "step", "job": "a", "step": 2, "epoch": 0.1, "loss": "nan"},
        {"event": "step", "job": "a", "step": 3, "epoch": 0.1},
        {"event": "step", "job": "a", "step": 4, "epoch": 0.1, "grad_norm": 5.0, "loss": 2.0},
        [], 3,
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n\n" + "[" * 100_000 + "\n", encoding="utf-8")
    assert len(read_metrics(path)) == 4
    curves = Curves(path)
    curves.read()
    _, found = curves.thinned()
    assert found["a"]["steps"] == [1, 2, 3, 4]
    assert found["a"]["losses"] == [1.0, None, None, 2.0]
