"""Candidates of a sweep: settings over a job's, and a name that says them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.search.config import Draw, SweepConfig

MOST = 100
"""Combinations of a grid that are taken without a word; of more, `max_trials` is to say how many."""
_LONGEST_NAME = 90


@dataclass(frozen=True)
class Candidate:
    """`values`: by dotted setting."""

    name: str
    values: Mapping[str, Any]

    def as_entry(self) -> dict[str, Any]:
        """An entry of `jobs`."""
        entry: dict[str, Any] = {"name": self.name}
        for path, value in self.values.items():
            *parents, key = path.split(".")
            group = entry
            for parent in parents:
                known = group.get(parent)
                group[parent] = group = dict(known) if isinstance(known, Mapping) else {}
            group[key] = value
        return entry


def num_combinations(sweep: SweepConfig) -> int:
    """Of `candidates` and `grid`, before anything is drawn."""
    return max(1, len(sweep.candidates)) * math.prod(len(values) for values in sweep.grid.values())


def too_many(sweep: SweepConfig) -> bool:
    """More than anybody means without saying so."""
    return sweep.max_trials is None and num_combinations(sweep) > MOST


def num_trials(sweep: SweepConfig) -> int:
    """Candidates in all."""
    combinations = num_combinations(sweep)
    if sweep.max_trials is None:
        return combinations
    return sweep.max_trials if sweep.random else min(combinations, sweep.max_trials)


STARTUP = 10
"""Candidates that optuna's sampler has nothing to learn from yet."""


def first_candidates(sweep: SweepConfig) -> list[Candidate]:
    """All candidates; with `sampler: optuna` those that are drawn before there are results, and where there are too
    many without a word, the first alone. The same for the same settings."""
    number = 1 if too_many(sweep) else num_trials(sweep)
    if sweep.sampler == "optuna":
        number = min(number, STARTUP)
    total = num_trials(sweep)
    values = itertools.islice(_values(sweep), number)
    return [Candidate(name_of(place, total, each), each) for place, each in enumerate(values)]


def candidates_among(sweep: SweepConfig, names: Collection[str]) -> list[Candidate]:
    """Those of the first candidates that a run has as jobs: all, or those of its share."""
    return [candidate for candidate in first_candidates(sweep) if candidate.name in names]


def trials_among(sweep: SweepConfig, names: Collection[str]) -> int:
    """Candidates in all, of a run that has these as jobs when it begins."""
    return num_trials(sweep) if sweep.sampler == "optuna" else len(candidates_among(sweep, names))


def _values(sweep: SweepConfig) -> Iterator[dict[str, Any]]:
    combinations, number = num_combinations(sweep), num_trials(sweep)
    chosen: Sequence[int] = range(combinations)
    if number < combinations:
        # without a list of all: there may be billions
        generator = np.random.default_rng((sweep.seed, 1))
        drawn: dict[int, None] = {}
        while len(drawn) < number:
            drawn[int(generator.integers(combinations))] = None
        chosen = sorted(drawn)
    for trial in range(number):
        place = chosen[trial % len(chosen)]
        yield _combination(sweep, place) | {
            name: draw(each, np.random.default_rng((sweep.seed, 0, trial, order)))
            for order, (name, each) in enumerate(sweep.random.items())
        }


def _combination(sweep: SweepConfig, place: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, options in reversed(sweep.grid.items()):
        place, index = divmod(place, len(options))
        values[name] = options[index]
    values = dict(reversed(values.items()))
    return {**(sweep.candidates[place] if sweep.candidates else {}), **values}


def draw(given: Draw, generator: np.random.Generator) -> Any:
    """A value of the kind that is asked for."""
    if given.choice is not None:
        return given.choice[int(generator.integers(len(given.choice)))]
    if given.integer is not None:
        return int(generator.integers(given.integer[0], given.integer[1] + 1))
    if given.uniform is not None:
        return _rounded(generator.uniform(*given.uniform))
    assert given.log_uniform is not None
    low, high = given.log_uniform
    return _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def _rounded(value: float) -> float:
    """To four digits, as a person would write it down; nobody can tell the rest."""
    return float(f"{value:.4g}")


def name_of(place: int, total: int, values: Mapping[str, Any]) -> str:
    """`03-rank=8-learning_rate=0.0003`: unlike any other, and a name of a folder."""
    number = str(place).zfill(len(str(max(1, total - 1))))
    parts = [f"{path.rpartition('.')[2]}={value}" for path, value in values.items() if _is_short(value)]
    text = "-".join([number, *parts])
    return re.sub(r"[^\w.+=-]", "_", text)[:_LONGEST_NAME].rstrip(".")


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, bool, str)) and len(str(value)) <= 24
