"""Sequence packing (sample packing): optimizer steps filled with sequences by best fit."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `capacity`: each in turn goes into the fullest bin with room for it.

    In the order given, not by decreasing length as packing usually has it: bins that hold sequences of about one length
    each are steps that learn from long documents now and from short ones then (docs/log.md, 2026-11-26, has what that
    costs), and where nothing is padded a bin that is not full costs nothing. A length above `capacity` stands alone.
    Indices ascend within a bin, and so do the bins' first ones. O(n log n): the free rooms are kept in a sorted list.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the different rooms that some bin has left, ascending
    with_room: dict[int, list[int]] = {}  # bins by the room they have left
    for index, length in enumerate(lengths):
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
    return bins
