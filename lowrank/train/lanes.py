"""Data parallelism: a step divided into lanes, which are computed by one process or by several, to the same bits.

    units of the step --assign--> lanes --forward, backward--> gradients --binary tree--> sum on every rank

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
    """Dummy passes after these, so that all ranks make the same number of passes."""


class Gradients(Protocol):
    """Sums the gradients of a step's lanes as they are computed."""

    def accumulate(self) -> None:
        """Called after the backward passes of each lane; adds the lane's gradients."""
        ...

    def finish_reduce(self) -> None:
        """Called after all lanes; sums over the ranks and puts the sum into `Parameter.grad`."""
        ...


class Lanes(Protocol):
    """Divides the work of a step into lanes and combines their results."""

    ranks: Ranks
    count: int
    local: range
    """The lanes that this rank computes."""

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """Return the passes of each lane of this rank. `whole`: the whole step as `split` cuts it, if that is known."""
        ...

    def gradients(self, parameters: Parameters) -> Gradients:
        """Return an accumulator for these parameters, none of which has a gradient yet."""
        ...

    def metrics(self, lanes: Sequence[dict[int, Metrics]]) -> dict[int, Metrics]:
        """Return the sum over all lanes, of all ranks, of the metrics of this rank's lanes, by slot."""
        ...

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """Return the row losses of all lanes, by slot, in the order of the work."""
        ...

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """Return the arrays of all lanes, (L) float32 for each segment of the only slot, in the order of the work."""
        ...


class _InPlace:
    """Gradients of one process, which autograd sums in place."""

    def accumulate(self) -> None:
        """See Gradients. autograd has added them already."""

    def finish_reduce(self) -> None:
        """See Gradients. They are the sum already."""


class OneLane:
    """The step as it is, in one process."""

    ranks: Ranks = ALONE
    count = 1
    local = range(1)

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """See Lanes. The only lane has all passes."""
        return [LanePasses(split(work) if whole is None else whole)]

    def gradients(self, parameters: Parameters) -> Gradients:
        """See Lanes."""
        return _InPlace()

    def metrics(self, lanes: Sequence[dict[int, Metrics]]) -> dict[int, Metrics]:
        """See Lanes. Nothing is read from the device."""
        return lanes[0]

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """See Lanes."""
        return lanes[0]

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """See Lanes."""
        return lanes[0]


class ManyLanes:
    """`count` lanes, of which each rank has the same number, next to one another."""

    def __init__(self, ranks: Ranks, count: int, in_step: bool = False) -> None:
        """`in_step`: all ranks make the same number of passes, since they share what computes (a sharded base)."""
        assert count & (count - 1) == 0, "a power of two"
        assert count % ranks.world == 0, "checked with the settings"
        self.ranks, self.count, self.in_step = ranks, count, in_step
        per_rank = count // ranks.world
        self.local = range(ranks.rank * per_rank, (ranks.rank + 1) * per_rank)

    def passes(self, work: StepSegments, whole: list[Batch] | None, split: Split) -> list[LanePasses]:
        """See Lanes. With `in_step`, a rank also cuts the other ranks' lanes, since it knows the whole step, to learn
        how many passes they make."""
        lane_of = assign_units(work, self.count)
        if not self.in_step:
            return [LanePasses(split(_part(work, lane_of, lane))) for lane in self.local]
        lanes = [split(_part(work, lane_of, lane)) for lane in range(self.count)]
        per_rank = len(self.local)
        found = []
        for index, lane in enumerate(self.local):
            most = max(len(each) for each in lanes[index::per_rank])
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
                sums = found.setdefault(int(slot), {})
                for name, number in numbers.items():
                    sums[name] = sums.get(name, 0.0) + number
        return found

    def rows(self, work: StepSegments, lanes: Sequence[dict[int, RowLosses]]) -> dict[int, RowLosses]:
        """See Lanes. Each unit is one row."""
        given = [{slot: [list(rows.loss_terms), list(rows.counts)] for slot, rows in lane.items()} for lane in lanes]
        received = [lane for of_rank in self.ranks.exchange([_as_json(lane) for lane in given]) for lane in of_rank]
        lane_of, found = assign_units(work, self.count), {}
        for slot in work:
            if str(slot) not in {name for lane in received for name in lane}:
                continue
            waiting = [iter(zip(*lane.get(str(slot), ((), ())))) for lane in received]
            pairs = [next(waiting[lane]) for lane in lane_of[slot]]
            loss_terms, counts = zip(*pairs) if pairs else ((), ())
            found[slot] = RowLosses(tuple(loss_terms), tuple(counts))
        return found

    def arrays(self, work: StepSegments, lanes: Sequence[list[np.ndarray]]) -> list[np.ndarray]:
        """See Lanes. Each rank adds the arrays of its lanes to zeros."""
        (slot,) = work
        lengths = [len(segment) for segment in work[slot]]
        begins = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
        flat = np.zeros(int(begins[-1]), np.float32)
        segment_lanes = _segment_lanes(work[slot], assign_units(work, self.count)[slot])
        for lane, found in zip(self.local, lanes):
            indices = [index for index, of_segment in enumerate(segment_lanes) if of_segment == lane]
            for index, values_L in zip(indices, found):
                flat[begins[index] : begins[index + 1]] = values_L
        self.ranks.add(torch.from_numpy(flat))
        return [flat[begin:end] for begin, end in itertools.pairwise(begins.tolist())]


class _Tree:
    """Gradients added as a binary tree: a sum over some lanes is kept until there is another sum over as many."""

    def __init__(self, ranks: Ranks, parameters: Parameters) -> None:
        assert all(parameter.grad is None for parameter in parameters), "a step begins without gradients"
        self._ranks, self._parameters = ranks, list(parameters)
        self._sums: list[tuple[int, torch.Tensor]] = []
        """`(number of lanes, sum)`, in descending order of the number."""

    @torch.no_grad()
    def accumulate(self) -> None:
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
    def finish_reduce(self) -> None:
        """See Gradients."""
        ((_, flat_N),) = self._sums
        self._ranks.add(flat_N)
        numbers = [parameter.numel() for parameter in self._parameters]
        *sums, touched_P = flat_N.split([*numbers, len(numbers)])
        for parameter, sum_n, touched in zip(self._parameters, sums, touched_P.tolist()):
            if touched:
                parameter.grad = sum_n.view_as(parameter).to(parameter.dtype)


def _flattened(parameters: Parameters) -> torch.Tensor:
    """Return all gradients as one vector, float32 (float64 if a parameter is), followed by one number for each
    parameter: 1 if it has a gradient."""
    wide = torch.float64 if any(each.dtype == torch.float64 for each in parameters) else torch.float32
    device = parameters[0].device
    total = sum(parameter.numel() for parameter in parameters)
    flat_N = torch.zeros(total + len(parameters), dtype=wide, device=device)
    begin = 0
    for index, parameter in enumerate(parameters):
        if parameter.grad is not None:
            flat_N[begin : begin + parameter.numel()] = parameter.grad.reshape(-1)
            flat_N[total + index] = 1.0
        begin += parameter.numel()
    return flat_N


def assign_units(work: StepSegments, lanes: int) -> dict[int, list[int]]:
    """Return the lane of each unit of each slot's work: the longest unit first, each to the lane with the fewest
    tokens."""
    units_of = {slot: units(work[slot]) for slot in sorted(work)}
    lane_of = iter(balance([sum(map(len, unit)) for slot_units in units_of.values() for unit in slot_units], lanes))
    return {slot: [next(lane_of) for _ in slot_units] for slot, slot_units in units_of.items()}


def heaviest_lane(work: StepSegments, lanes: int) -> StepSegments:
    """Return the work of the lane with the most tokens; with one lane, all of it."""
    if lanes == 1:
        return work
    lane_of = assign_units(work, lanes)
    parts = [_part(work, lane_of, lane) for lane in range(lanes)]
    return max(parts, key=lambda part: sum(len(each) for segments in part.values() for each in segments))


def _part(work: StepSegments, lane_of: Mapping[int, Sequence[int]], lane: int) -> dict[int, list[Segment]]:
    """Return the work of one lane, in its order."""
    return {
        slot: [each for unit, of_unit in zip(units(work[slot]), lane_of[slot]) if of_unit == lane for each in unit]
        for slot in work
    }


def _segment_lanes(segments: Sequence[Segment], lane_of: Sequence[int]) -> list[int]:
    """Return the lane of each segment."""
    return [lane for unit, lane in zip(units(segments), lane_of) for _ in unit]


def _as_json(by_slot: Mapping[int, Any]) -> dict[str, Any]:
    return {str(slot): value for slot, value in by_slot.items()}
