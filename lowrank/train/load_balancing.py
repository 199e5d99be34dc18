"""Balanced assignment of work whose cost is known: units of a step to lanes, jobs to devices."""

from __future__ import annotations

from collections.abc import Sequence


def balance(costs: Sequence[float], bins: int) -> list[int]:
    """Return the bin of each cost, 0 is the first. Greedy: the most expensive goes first, each into the bin with the
    least so far (Graham, 1969: at most a third above the best assignment). Equal costs go in their order, and equal
    bins from the first."""
    load = [0.0] * bins
    assigned = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda each: (-costs[each], each)):
        lightest = min(range(bins), key=lambda each: (load[each], each))
        assigned[index], load[lightest] = lightest, load[lightest] + costs[index]
    return assigned
