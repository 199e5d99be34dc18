"""Curves of every kind, many noises each: the verdict must be right 19 times in 20."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from lowrank.report.curve import Curve, noise_of, smooth
from lowrank.report.verdict import CurveVerdict, Kind, verdict

Shape = Callable[[np.ndarray], np.ndarray]

FALLING: dict[str, Shape] = {
    "linear": lambda t: 3 - 1.5 * t,
    "exponential": lambda t: 1 + 2 * np.exp(-2 * t),
    "logarithm": lambda t: 3 - 0.3 * np.log(1 + 300 * t),
    "power law": lambda t: 1.5 + 0.5 * (t + 0.01) ** -0.5,
    "from a high start": lambda t: 0.3 + 8 * np.exp(-4 * t) + 0.6 * (1 - t),
}
LATE: dict[str, Shape] = {
    "plateau, then fall": lambda t: np.where(t < 0.9, 2.0, 2.0 - 5 * (t - 0.9)),
    "warm restarts": lambda t: 3 - t + 0.3 * np.cos(np.pi * ((4 * t - 1e-9) % 1)),
}
"""Falls that a few points cannot show."""
FLAT: dict[str, Shape] = {
    "constant": lambda t: 2 + 0 * t,
    "hinge": lambda t: np.maximum(3 - 4 * t, 1),
    "fast exponential": lambda t: 1 + 2 * np.exp(-15 * t),
    "tiny": lambda t: 0.01 + 3 * np.exp(-30 * t),
}
DIVERGED: dict[str, Shape] = {
    "turns": lambda t: np.where(t < 0.5, 3 - 2 * t, 2 + 4 * (t - 0.5)),
    "jumps": lambda t: np.where(t < 0.85, 3 - 2 * t, 7.0),
    "from the start": lambda t: 3 + 5 * t,
}


def gaussian(generator: np.random.Generator, number: int, size: float) -> np.ndarray:
    return generator.normal(0, size, number)


def heavy(generator: np.random.Generator, number: int, size: float) -> np.ndarray:
    return size * generator.standard_t(3, number) / math.sqrt(3)


CASES = [
    (kind, name, shape)
    for kind, shapes in (("falling", FALLING), ("flat", FLAT), ("diverged", DIVERGED))
    for name, shape in shapes.items()
]


@pytest.mark.parametrize("noise", [gaussian, heavy])
@pytest.mark.parametrize("number", [30, 120, 800])
@pytest.mark.parametrize(("kind", "name", "shape"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_training_curves(kind: Kind, name: str, shape: Shape, number: int, noise: Callable[..., np.ndarray]) -> None:
    steps = np.arange(1, number + 1)
    found = []
    for seed in range(60):
        losses = shape(steps / number) + noise(np.random.default_rng(seed), number, 0.02)
        found.append(verdict(list(steps), list(losses)))
    assert sum(each.kind == kind for each in found) >= 57, [each.sentence for each in found if each.kind != kind]


@pytest.mark.parametrize("number", [120, 800])
@pytest.mark.parametrize("name", LATE)
def test_falls_that_begin_late(name: str, number: int) -> None:
    test_training_curves("falling", name, LATE[name], number, gaussian)


@pytest.mark.parametrize("number", [60, 300, 2000])
def test_flat_since_the_step_where_the_fall_ended(number: int) -> None:
    steps = np.arange(1, number + 1)
    since = []
    for seed in range(40):
        losses = FLAT["hinge"](steps / number) + np.random.default_rng(seed).normal(0, 0.03, number)
        described = verdict(list(steps), list(losses))
        if described.kind == "flat":
            assert f"since step {described.step}" in described.sentence
            since.append((described.step or 0) / number)
    assert len(since) >= 38
    assert abs(np.median(since) - 0.5) < 0.05


@pytest.mark.parametrize("number", [4, 6, 10, 40])
def test_overfitting_names_the_best_step(number: int) -> None:
    steps = np.linspace(30, 300, number).round().astype(int)
    train = [(step, 3 - step / 200) for step in range(1, 301)]
    right = 0
    for seed in range(60):
        losses = 2 + np.abs(steps / 300 - 0.5) + np.random.default_rng(seed).normal(0, 0.01, number)
        points = [(int(step), float(loss)) for step, loss in zip(steps, losses)]
        described = verdict([step for step, _ in train], [loss for _, loss in train], points)
        best = min(points, key=lambda point: point[1])[0]
        right += (
            described.kind == "overfitting" and described.step == best and f"kept at step {best}" in described.sentence
        )
    assert right >= 57


@pytest.mark.parametrize("number", [10, 20, 40])
@pytest.mark.parametrize("kind", ["flat", "falling"])
def test_held_out_curve_decides_when_there_is_one(kind: Kind, number: int) -> None:
    """The training loss falls all the time; what helps nobody on held-out rows is no reason to go on."""
    steps = np.linspace(30, 300, number).round().astype(int)
    course = 1.5 + np.exp(-20 * steps / 300) if kind == "flat" else 2 - steps / 300
    right = 0
    for seed in range(60):
        losses = course + np.random.default_rng(seed).normal(0, 0.005, number)
        points = [(int(step), float(loss)) for step, loss in zip(steps, losses)]
        described = verdict(list(range(1, 301)), [3 - step / 200 for step in range(1, 301)], points)
        right += described.kind == kind and "held-out" in described.sentence
    assert right >= 57


def test_a_held_out_fall_is_told_in_numbers_that_were_printed() -> None:
    """Not those of a line through them, which ends below every evaluation where the curve bends."""
    loss = [2.0371, 1.3496, 1.2330, 1.1565, 1.0896, 1.0031, 0.9526, 0.9021, 0.8775, 0.8696]
    points = [(200 * number, each) for number, each in enumerate(loss, start=1)]
    described = verdict(range(1, 2001), np.geomspace(8, 0.6, 2000).tolist(), points).sentence
    assert described.startswith("Still falling: the held-out loss went from 1.0031 to 0.8696 from step 1200 to 2000.")


def test_few_evaluations_are_told_but_do_not_decide() -> None:
    described = verdict(
        list(range(1, 301)), [3 - step / 200 for step in range(1, 301)], [(100, 2.0), (200, 1.9), (300, 1.91)]
    )
    assert described.kind == "falling"
    assert "best 1.9000 at step 200, last 1.9100" in described.sentence


HALVING = [5.84 * 2 ** (-step / 4) + 0.1 * 2 ** (-step / 60) for step in range(120)]
"""From 5.84 to below 0.1 in its first quarter, and then it halves every 60 steps."""


def test_a_loss_that_still_halves_is_no_flat_one_however_high_it_began() -> None:
    for end in (40, 60, 90, 120):
        losses = np.array(HALVING[:end]) * np.exp(np.random.default_rng(end).normal(0, 0.02, end))
        described = verdict(list(range(1, end + 1)), losses.tolist())
        assert described.kind == "falling", (end, described.sentence)


def test_a_held_out_loss_that_still_falls_is_heard_before_a_flat_training_loss() -> None:
    flat = [0.05 + 0.02 * (step % 2) for step in range(120)]
    described = verdict(list(range(1, 121)), flat, [(60, 0.12), (120, 0.08)])
    assert described.kind == "falling"
    assert described.sentence.startswith(
        "Still falling: the held-out loss went from 0.1200 to 0.0800 from step 60 to 120."
    )
    assert verdict(list(range(1, 121)), flat, [(60, 0.12), (120, 0.1195)]).kind == "flat"
    assert verdict(list(range(1, 121)), flat, [(40, 0.139), (80, 0.14), (120, 0.1389)]).kind == "flat"


def test_what_is_below_a_thousandth_of_a_nat_is_flat() -> None:
    assert verdict(list(range(120)), [0.01 * 2 ** (-step / 10) for step in range(120)]).kind == "flat"


def test_a_restart_is_no_divergence() -> None:
    steps = np.arange(1, 251)
    for end in range(60, 251, 10):
        cycle = (steps[:end] % 60) / 60
        losses = 1 + 4 * np.exp(-steps[:end] / 20) + 0.25 * (np.cos(np.pi * cycle) + 1) / 2
        losses = losses + np.random.default_rng(end).normal(0, 0.02, end)
        assert verdict(steps[:end].tolist(), losses.tolist()).kind in ("falling", "flat")


def test_noise_that_hides_a_fall_is_admitted() -> None:
    losses = 2 + np.random.default_rng(0).normal(0, 0.3, 60)
    described = verdict(list(range(60)), list(losses))
    assert described.kind == "flat"
    assert "within its noise" in described.sentence
    assert "Time to stop" not in described.sentence


@pytest.mark.parametrize(
    ("losses", "kind", "step"),
    [
        ([], "too_short", None),
        ([2.0], "too_short", None),
        ([2.0] * 11, "too_short", None),
        ([math.nan], "diverged", 1),
        ([math.nan] * 30, "diverged", 1),
        ([2.0] * 20 + [math.inf] * 10, "diverged", 21),
        ([2.0] * 29 + [math.nan], "flat", 1),
        ([0.0] * 30, "flat", 1),
        ([2.0, math.nan] * 20 + [2.0, 2.0], "flat", 1),
    ],
)
def test_edges(losses: list[float], kind: Kind, step: int | None) -> None:
    described = verdict(list(range(1, len(losses) + 1)), losses)
    assert (described.kind, described.step) == (kind, step), described.sentence


def test_evaluations_without_training_losses() -> None:
    assert verdict([], [], [(1, 2.0), (2, 1.0), (3, 1.5), (4, 1.6)]).kind == "overfitting"
    assert verdict([], [], [(1, 2.0), (2, math.nan)]).kind == "too_short"
    assert verdict([], [], [(step, 3.0 - 0.1 * step) for step in range(10)]).kind == "falling"


def test_order_of_points_does_not_matter() -> None:
    steps = list(range(1, 101))
    losses = [3 - step / 50 for step in steps]
    assert verdict(steps[::-1], losses[::-1], [(9, 1.0), (3, 2.0)]) == verdict(steps, losses, [(3, 2.0), (9, 1.0)])
    assert isinstance(verdict(steps, losses), CurveVerdict)


def test_smooth_follows_a_line_and_steps_over_gaps() -> None:
    line = np.linspace(3, 1, 200)
    assert np.abs(smooth(line) - line)[20:-20].max() < 1e-9
    assert np.abs(smooth(line) - line).max() < 0.05
    line[50:53] = math.nan
    assert np.abs(smooth(line)[49:54] - np.linspace(3, 1, 200)[49:54]).max() < 0.01
    assert np.isnan(smooth([math.nan] * 5)).all()
    assert list(smooth([1.0, 2.0])) == [1.0, 2.0]


def test_smooth_takes_the_noise_away() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 1000)
    assert smooth(noise).std() < 0.15
    assert noise_of(noise + np.linspace(0, 50, 1000)) == pytest.approx(1.0, rel=0.1)


def test_curve_is_bounded_and_keeps_the_mean() -> None:
    curve = Curve(limit=16)
    losses = [float(step % 7) for step in range(1, 1001)]
    for step, loss in enumerate(losses, start=1):
        curve.add(step, loss)
    steps, means = curve.points()
    assert len(steps) <= 16
    assert steps == sorted(steps)
    assert steps[-1] == 1000
    weights = np.diff([0, *steps])
    assert np.average(means, weights=weights) == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 100, 513])
def test_curve_goes_on_exactly_from_its_state(cut: int) -> None:
    whole, cut_once = Curve(limit=16), Curve(limit=16)
    for step in range(1, 1001):
        loss = math.nan if step % 50 == 0 else 1 / step
        whole.add(step, loss)
        cut_once.add(step, loss)
        if step == cut:
            cut_once = Curve.restore(json.loads(json.dumps(cut_once.state())))
    assert cut_once.points() == whole.points()
