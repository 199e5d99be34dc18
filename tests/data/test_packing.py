"""Best fit against a plain quadratic one."""

from __future__ import annotations

import random
import time

import pytest

from lowrank.data.batching.packing import best_fit


def quadratic_best_fit(lengths: list[int], capacity: int) -> int:
    """Number of bins, by looking at every bin each time."""
    rooms: list[int] = []
    for length in lengths:
        fitting = [place for place, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda place: rooms[place])] -= length
        else:
            rooms.append(capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit(seed: int) -> None:
    draw = random.Random(seed)
    capacity = draw.randint(1, 200)
    lengths = [draw.randint(1, capacity + 10) for _ in range(draw.randint(0, 300))]
    bins = best_fit(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    for members in bins:
        assert members == sorted(members)
        assert sum(lengths[index] for index in members) <= capacity or len(members) == 1
    assert len(bins) == quadratic_best_fit(lengths, capacity)
    assert [members[0] for members in bins] == sorted(members[0] for members in bins)


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    assert best_fit([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert best_fit([3, 8, 6, 2, 1], 10) == [[0, 2, 4], [1, 3]]
    assert best_fit([], 10) == []
    assert best_fit([11, 3], 10) == [[0], [1]]


def test_best_fit_of_many() -> None:
    draw = random.Random(0)
    lengths = [min(8192, int(draw.lognormvariate(5.5, 1))) + 1 for _ in range(200_000)]
    began = time.process_time()
    bins = best_fit(lengths, 8192)
    assert time.process_time() - began < 5  # quadratic would take minutes
    assert len(bins) <= 1.02 * sum(lengths) / 8192


def test_bins_are_alike() -> None:
    """Long and short sequences in each, as in the data; decreasing, the first bins would hold nothing but long ones."""
    draw = random.Random(0)
    lengths = [draw.choice([20, 30, 200, 400]) for _ in range(4000)]
    bins = best_fit(lengths, 2048)
    long = [sum(lengths[index] >= 200 for index in members) / len(members) for members in bins[:-3]]
    assert 0 < min(long) < max(long) < 1
