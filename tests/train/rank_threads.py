"""Ranks as threads of one process: the same calls as processes make, without their start."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from lowrank.ranks import RankLost, by_halves

Result = TypeVar("Result")


class _Room:
    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world, timeout=60)
        self.places: list[Any] = [None] * world

    def together(self, rank: int, value: Any) -> list[Any]:
        try:
            self.places[rank] = value
            self.barrier.wait()
            found = list(self.places)
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise RankLost("another rank has ended") from error
        return found


class ThreadRank:
    """One of `world` threads."""

    def __init__(self, room: _Room, rank: int, world: int) -> None:
        self.rank, self.world, self._room = rank, world, room
        self.stop_requested = False
        self.wants_to_stop: Callable[[], bool] = lambda: False
        self.sums: list[int] = []
        """How many numbers each sum had."""
        self.exchanges = 0

    def begin(self, device: torch.device) -> None:
        """Nothing to make."""

    def exchange(self, value: Any) -> list[Any]:
        self.exchanges += 1
        received = [
            json.loads(each) for each in self._room.together(self.rank, json.dumps([self.wants_to_stop(), value]))
        ]
        self.stop_requested = self.stop_requested or any(requested for requested, _ in received)
        return [each for _, each in received]

    def add(self, flat_N: torch.Tensor) -> None:
        self.sums.append(len(flat_N))
        flat_N.copy_(by_halves([each.clone() for each in self._room.together(self.rank, flat_N.clone())]))


def on_ranks(world: int, work: Callable[[ThreadRank], Result]) -> list[Result]:
    """What `work` gives on each of `world` ranks at once. The first error of any is raised."""
    room = _Room(world)
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(room, rank, world))
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, RankLost)), errors[0])
    return results
