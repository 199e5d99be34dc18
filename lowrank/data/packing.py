"""Filling optimiser steps with sequences by best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`, by best fit decreasing.

    The longest come first, each into the fullest bin that still has room for it; within a bin indices ascend.
    A length above `capacity` stands alone. O(n log n): the free rooms are kept in a sorted list. The number of bins
    depends on the lengths alone, not on their order.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that some bin has left, ascending
    with_room: dict[int, list[int]] = {}  # bins by the room they have left
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            number, room = len(bins), capacity
            bins.append([])
        else:
            room = rooms[place]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[number].append(index)
        left = room - length
        if left > 0:
            if left not in with_room:
                insort(rooms, left)
                with_room[left] = []
            with_room[left].append(number)
    return [sorted(members) for members in bins]
