"""Data parallelism: a step divided into lanes, which are computed by one process or by several, to the same bits.

    units of the step --assign--> lanes --own--> passes, gradients --by halves--> ranks add --> every rank has the sum

A lane is cut into passes by itself, and lanes are added as a binary tree, within a rank and then between ranks. So the
shapes of all products and the order of all additions depend on the number of lanes, never on how many ranks share them.
The number is a power of two; a run keeps it in its checkpoints. What a loss is divided by is counted over the whole
step, on every rank alike, before anything is computed.

`OneLane` is a step as it is: nothing is assigned, copied or added.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lowrank.batches import Batch
from lowrank.objectives import Metrics
from lowrank.ranks import ALONE, Ranks
from lowrank.segments import Segment
from lowrank.train.load_balancing import balance
from lowrank.train.micro_batching import StepSegments, units
from lowrank.train.step_metrics import read_metrics_to_host
from lowrank.train.trained_job import RowLosses

Parameters = Sequence[torch.nn.Parameter]
Split = Callable[[StepSegments], list[Batch]]


class LanePasses(NamedTuple):
    """The passes of one lane."""

    batches: list[Batch]
    idle: int = 0
    """After these, so many passes without meaning, for ranks that must keep in step: others have as many more."""


class Gradients(Protocol):
    """Gradients of a step's lanes while they are computed."""

    def take(self) -> None:
        """A lane's backward passes are over."""
        ...

    def spread(self) -> None:
        """All lanes are computed: put the sum where the optimizer reads it."""
        ...


class Lanes(Protocol):
    """How the work of a step is divided, and its results are put together."""

    ranks: Ranks
    count: int
    own: range
    """The lanes of this rank."""

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """The passes of each lane of this rank. `whole`: the step as `split` cuts it, where that is known."""
        ...

    def gradients(self, parameters: Parameters) -> Gradients:
        """For the gradients of these, none of which has one."""
        ...

    def metrics(self, lanes: Sequence[dict[int, Metrics]]) -> dict[int, Metrics]:
        """What each of this rank's lanes has found, by slot, as the sum over all lanes."""
        ...

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """Losses of rows, by slot, in the order of the work."""
        ...

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """An array for each token of one slot's segments, (L) float32, in the order of the work."""
        ...


class _InPlace:
    """Gradients that stay where the backward passes leave them."""

    def take(self) -> None:
        """They are there."""

    def spread(self) -> None:
        """They are the sum."""


class OneLane:
    """The step as it is, in one process."""

    ranks: Ranks = ALONE
    count = 1
    own = range(1)

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """One lane, with all there is."""
        return [LanePasses(split(work) if whole is None else whole)]

    def gradients(self, parameters: Parameters) -> Gradients:
        """Left in place."""
        return _InPlace()

    def metrics(self, lanes: Sequence[dict[int, Metrics]]) -> dict[int, Metrics]:
        """The lane's own, not read yet."""
        return lanes[0]

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """The lane's own."""
        return lanes[0]

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """The lane's own."""
        return lanes[0]


class ManyLanes:
    """`count` lanes, of which each rank has the same number, next to one another."""

    def __init__(self, ranks: Ranks, count: int, in_step: bool = False) -> None:
        """`in_step`: all ranks make the same number of passes, since they share what computes (a sharded base)."""
        assert count & (count - 1) == 0, "a power of two"
        assert count % ranks.world == 0, "checked with the settings"
        self.ranks, self.count, self.in_step = ranks, count, in_step
        per_rank = count // ranks.world
        self.own = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """See Lanes. Every rank knows the whole step, so it cuts the others' lanes too to know how many passes there
        are, and asks nobody."""
        lane_of = assign_units(work, self.count)
        if not self.in_step:
            return [LanePasses(split(_part(work, lane_of, lane))) for lane in self.own]
        lanes = [split(_part(work, lane_of, lane)) for lane in range(self.count)]
        per_rank = len(self.own)
        found = []
        for place, lane in enumerate(self.own):
            most = max(len(each) for each in lanes[place::per_rank])
            found.append(LanePasses(lanes[lane], most - len(lanes[lane])))
        return found

    def gradients(self, parameters: Parameters) -> Gradients:
        """See Lanes."""
        return _Tree(self.ranks, parameters)

    def metrics(self, lanes: Sequence[dict[int, Metrics]]) -> dict[int, Metrics]:
        """See Lanes. Every rank adds the numbers of all lanes in their order."""
        received = self.ranks.exchange([_as_json(read_metrics_to_host(lane)) for lane in lanes])
        found: dict[int, Metrics] = {}
        for lane in (lane for of_rank in received for lane in of_rank):
            for slot, numbers in lane.items():
                own = found.setdefault(int(slot), {})
                for name, number in numbers.items():
                    own[name] = own.get(name, 0.0) + number
        return found

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """See Lanes. A unit is a row."""
        given = [{slot: [list(rows.shares), list(rows.counts)] for slot, rows in lane.items()} for lane in lanes]
        received = [lane for of_rank in self.ranks.exchange([_as_json(lane) for lane in given]) for lane in of_rank]
        lane_of, found = assign_units(work, self.count), {}
        for slot in work:
            if str(slot) not in {name for lane in received for name in lane}:
                continue
            waiting = [iter(zip(*lane.get(str(slot), ((), ())))) for lane in received]
            pairs = [next(waiting[lane]) for lane in lane_of[slot]]
            shares, counts = zip(*pairs) if pairs else ((), ())
            found[slot] = RowLosses(tuple(shares), tuple(counts))
        return found

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """See Lanes. Each rank adds its own to zeros."""
        (slot,) = work
        lengths = [len(segment) for segment in work[slot]]
        begins = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        flat = np.zeros(int(begins[-1]), np.float32)
        places = _places(work[slot], assign_units(work, self.count)[slot])
        for lane, found in zip(self.own, lanes):
            own = [place for place, its in enumerate(places) if its == lane]
            for place, values_L in zip(own, found):
                flat[begins[place] : begins[place + 1]] = values_L
        self.ranks.add(torch.from_numpy(flat))
        return [flat[begin:end] for begin, end in itertools.pairwise(begins.tolist())]


class _Tree:
    """Gradients added by halves: those of a lane wait until another sum of as many lanes is there."""

    def __init__(self, ranks: Ranks, parameters: Parameters) -> None:
        assert all(parameter.grad is None for parameter in parameters), "a step's gradients begin at nothing"
        self._ranks, self._parameters = ranks, list(parameters)
        self._sums: list[tuple[int, torch.Tensor]] = []
        """`(lanes, sum)`, fewer and fewer lanes."""

    @torch.no_grad()
    def take(self) -> None:
        """See Gradients."""
        flat_N = _flattened(self._parameters)
        for parameter in self._parameters:
            parameter.grad = None
        lanes = 1
        while self._sums and self._sums[-1][0] == lanes:
            _, before_N = self._sums.pop()
            flat_N = before_N.add_(flat_N)
            lanes *= 2
        self._sums.append((lanes, flat_N))

    @torch.no_grad()
    def spread(self) -> None:
        """See Gradients."""
        ((_, flat_N),) = self._sums
        self._ranks.add(flat_N)
        numbers = [parameter.numel() for parameter in self._parameters]
        *pieces, touched_P = flat_N.split([*numbers, len(numbers)])
        for parameter, piece, touched in zip(self._parameters, pieces, touched_P.tolist()):
            if touched:
                parameter.grad = piece.view_as(parameter).to(parameter.dtype)


def _flattened(parameters: Parameters) -> torch.Tensor:
    """Gradients as one vector of float32 (float64 where a parameter is), and after them, for each parameter, whether it
    has one."""
    wide = torch.float64 if any(each.dtype == torch.float64 for each in parameters) else torch.float32
    device = parameters[0].device
    total = sum(parameter.numel() for parameter in parameters)
    flat_N = torch.zeros(total + len(parameters), dtype=wide, device=device)
    begin = 0
    for place, parameter in enumerate(parameters):
        if parameter.grad is not None:
            flat_N[begin : begin + parameter.numel()] = parameter.grad.reshape(-1)
            flat_N[total + place] = 1.0
        begin += parameter.numel()
    return flat_N


def assign_units(work: StepSegments, lanes: int) -> dict[int, list[int]]:
    """Return the lane of each unit of each slot's work: the longest unit first, each to the lane with the fewest
    tokens."""
    units_of = {slot: units(work[slot]) for slot in sorted(work)}
    lane_of = iter(balance([sum(map(len, unit)) for slot_units in units_of.values() for unit in slot_units], lanes))
    return {slot: [next(lane_of) for _ in slot_units] for slot, slot_units in units_of.items()}


def heaviest_lane(work: StepSegments, lanes: int) -> StepSegments:
    """The work of the lane with the most tokens; of one lane, all of it."""
    if lanes == 1:
        return work
    lane_of = assign_units(work, lanes)
    parts = [_part(work, lane_of, lane) for lane in range(lanes)]
    return max(parts, key=lambda part: sum(len(each) for own in part.values() for each in own))


def _part(work: StepSegments, lane_of: Mapping[int, Sequence[int]], lane: int) -> dict[int, list[Segment]]:
    """The work of one lane, in its order."""
    return {
        slot: [each for unit, its in zip(units(work[slot]), lane_of[slot]) if its == lane for each in unit]
        for slot in work
    }


def _places(segments: Sequence[Segment], lane_of: Sequence[int]) -> list[int]:
    """The lane of each segment."""
    return [lane for unit, lane in zip(units(segments), lane_of) for _ in unit]


def _as_json(by_slot: Mapping[int, Any]) -> dict[str, Any]:
    return {str(slot): value for slot, value in by_slot.items()}
