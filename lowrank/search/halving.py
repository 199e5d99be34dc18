"""Which candidates go on: successive halving, waiting for all at each rung, and ASHA, which waits for nobody.

A rung is an evaluation after a share of a candidate's own steps. Values are such that lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GO, HOLD, PRUNE = "running", "held", "over"
"""What becomes of a candidate: the words of pipelines/queued_job.py."""


_SETTLED = 2.0
"""So many times its warmup a candidate has trained before it is compared: until then a learning rate that is too high
looks good, since it has not been taken yet (measured: docs/sweeps.md)."""


def rung_shares(num_trials: int, reduction_factor: int, first: float | None, warmup: float = 0.0) -> list[float]:
    """The shares of a job's steps after which it is compared, ascending, without its end: from `first` on, or so that
    of `num_trials` about one is left after the last, and none too near to the `warmup` (its share of the steps) but
    the last."""
    if first is not None:
        shares, share = [], first
        while share < 1.0 - 1e-9:
            shares.append(share)
            share *= reduction_factor
        return shares
    rungs = max(1, math.floor(math.log(max(2, num_trials), reduction_factor) + 1e-9))
    shares = [reduction_factor ** -(rungs - index) for index in range(rungs)]
    return [share for share in shares if share >= _SETTLED * warmup - 1e-9] or shares[-1:]


def rung_steps(shares: Sequence[float], num_steps: int) -> list[int]:
    """The steps of a job after which it is compared, each once, all before its end."""
    steps = [max(1, math.ceil(share * num_steps - 1e-9)) for share in shares]
    return sorted({step for step in steps if step < num_steps})


@dataclass
class Halving:
    """What was seen at each rung, and what follows. `waits`: successive halving; else ASHA."""

    reduction_factor: int
    waits: bool
    results: list[dict[str, float]] = field(default_factory=list)
    """By rung, the value of each candidate that came there."""
    alive: list[str] = field(default_factory=list)
    """Candidates that may still come to the next rung, with `waits`."""
    settled: int = 0
    """Rungs that were decided, with `waits`."""

    def arrived(self, rung: int, values: Mapping[str, float]) -> dict[str, str]:
        """Candidates came to `rung` at the same time, with these values; what becomes of them, and with `waits` of
        others too."""
        while len(self.results) <= rung:
            self.results.append({})
        here = self.results[rung]
        here.update({name: value if math.isfinite(value) else math.inf for name, value in values.items()})
        if self.waits:
            return dict.fromkeys(values, HOLD) | self._settle(rung)
        best = self._best(here)
        return {name: GO if name in best else PRUNE for name in values}

    def left(self, name: str) -> dict[str, str]:
        """A candidate is over for a reason of its own; with `waits`, others may have waited for it."""
        if name in self.alive:
            self.alive.remove(name)
        if not self.waits or not self.results:
            return {}
        rung = len(self.results) - 1
        return self._settle(rung)

    def _settle(self, rung: int) -> dict[str, str]:
        """If all that can come to this rung are there."""
        here = self.results[rung]
        waiting = [name for name in self.alive if name in here]
        if not waiting or len(waiting) < len(self.alive) or rung < self.settled:
            return {}
        self.settled = rung + 1
        best = self._best(here)
        self.alive = [name for name in self.alive if name in best]
        return {name: GO if name in best else PRUNE for name in waiting}

    def _best(self, here: Mapping[str, float]) -> Collection[str]:
        """The best 1 in `reduction_factor`, at least one; of equal ones those that came first."""
        finite = [name for name in here if math.isfinite(here[name])] or list(here)
        kept = max(1, len(here) // self.reduction_factor)
        return sorted(finite, key=lambda name: here[name])[:kept]

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        results = [{name: _finite(value) for name, value in rung.items()} for rung in self.results]
        return {"results": results, "alive": list(self.alive), "settled": self.settled}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.results = [
            {name: math.inf if value is None else value for name, value in rung.items()} for rung in state["results"]
        ]
        self.alive, self.settled = list(state["alive"]), state["settled"]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
