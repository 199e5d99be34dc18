"""The table of a sweep: its intervals against the bootstrap, and its order."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank.search.candidates import Candidate
from lowrank.search.config import SweepConfig
from lowrank.search.ranking import ranked, table
from lowrank.search.sweep import Sweep, Trial


def trial(name: str, rows: np.ndarray, counts: np.ndarray, **more: object) -> Trial:
    """`rows`: mean loss of each row; they weigh by their tokens."""
    shares = rows * counts / counts.sum()
    loss = float(shares.sum())
    known = {"finished": "done", "step": 8, "num_steps": 8, "best": loss, "loss": loss, **more}
    return Trial(Candidate(name, {"seed": 1}), rows=[shares.tolist(), counts.tolist()], **known)  # type: ignore[arg-type]


def test_intervals_are_those_of_the_bootstrap() -> None:
    generator = np.random.default_rng(0)
    counts = generator.integers(5, 60, 200).astype(float)
    hard = generator.normal(2.0, 0.8, 200)
    one, other = hard + generator.normal(0, 0.05, 200), hard + 0.02 + generator.normal(0, 0.05, 200)
    sweep = Sweep(SweepConfig(grid={"seed": (1, 2)}), [], "loss")
    sweep.trials = {"a": trial("a", one, counts), "b": trial("b", other, counts)}
    first, second = table(sweep)["candidates"]
    drawn = generator.integers(200, size=(4000, 200))
    mean = lambda rows: (rows[drawn] * counts[drawn]).sum(1) / counts[drawn].sum(1)  # noqa: E731
    assert first["interval"] == pytest.approx(np.quantile(mean(one), [0.025, 0.975]), abs=0.02)
    paired = np.quantile(mean(other) - mean(one), [0.025, 0.975])
    assert second["difference_interval"] == pytest.approx(paired, abs=0.002)
    assert not second["tied"], "apart from the rows' own difficulty, a difference of 0.02 is certain"
    assert second["interval"][0] < first["loss"], "though the intervals overlap"


def test_who_came_furthest_is_first() -> None:
    rows = np.array([1.0, 2.0])
    trials = [
        trial("pruned early", rows - 0.9, rows, finished="pruned", step=2),
        trial("worse", rows + 1, rows),
        trial("best", rows, rows),
        trial("pruned late", rows + 2, rows, finished="pruned", step=4),
        trial("never began", rows, rows, finished="stopped", step=0, best=None, loss=None),
    ]
    assert [each.name for each in ranked(trials)] == ["best", "worse", "pruned late", "pruned early", "never began"]


def test_a_metric_of_answers_has_intervals_of_its_own() -> None:
    """Twelve answers of 40 are right, and eight more; what the loss says stands beside it."""
    hits = np.zeros(40)
    hits[:12] = 100.0
    more = hits.copy()
    more[12:20] = 100.0
    sweep = Sweep(SweepConfig(grid={"seed": (1, 2)}), [], "exact_match")
    counts = np.ones(40)
    sweep.trials = {
        "a": trial("a", more, counts, loss=3.0, score=50.0, best=-50.0),
        "b": trial("b", hits, counts, loss=1.0, score=30.0, best=-30.0),
    }
    first, second = table(sweep)["candidates"]
    assert (first["name"], first["loss"], first["score"]) == ("a", 3.0, 50.0)
    assert first["interval"] == pytest.approx(
        [50 - 1.96 * 100 * np.sqrt(0.25 / 39), 50 + 1.96 * 100 * np.sqrt(0.25 / 39)]
    )
    assert second["difference"] == pytest.approx(-20)
    assert second["difference_interval"] == pytest.approx([-20 - 1.96 * 6.405, -20 + 1.96 * 6.405], abs=0.01)
    assert not second["tied"]
