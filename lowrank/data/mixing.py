"""Several datasets as one: all of them, drawn by weight, and a part of them held out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import numpy as np

from lowrank.data.config import Config
from lowrank.data.feed import Sample
from lowrank.data.tally import Tally
from lowrank.errors import DataError

_SPLIT, _MIX = 1, 2
"""What the seed is used for, beside `max_samples`."""

Row = tuple[int, tuple[Sample, ...]]
"""Digest of a record, and its samples."""


def flat(rows: Iterable[Row]) -> Iterator[Sample]:
    """The samples without their digests."""
    return chain.from_iterable(samples for _, samples in rows)


def mix(config: Config, parts: Sequence[Iterator[Sample]], seed: int) -> Iterator[tuple[int, Sample]]:
    """`(dataset, sample)` of the training datasets: one after another, or drawn by weight until one is used up."""
    if config.mix == "concat" or len(parts) == 1:
        for index, part in enumerate(parts):
            yield from ((index, sample) for sample in part)
        return
    bounds = np.cumsum([source.weight for source in config.train])
    generator = np.random.default_rng((seed, _MIX))
    heads = [next(part, None) for part in parts]
    while None not in heads:
        draw = generator.random() * bounds[-1]
        index = int(np.searchsorted(bounds, draw, side="right"))
        sample = heads[index]
        assert sample is not None
        yield index, sample
        heads[index] = next(parts[index], None)


def put_together(config: Config, parts: Sequence[Sequence[Row]], tallies: Sequence[Tally], seed: int) -> list[Sample]:
    """`mix` of datasets in memory; counts what is not drawn."""
    for tally, part in zip(tallies, parts):
        tally.num_not_drawn = sum(len(samples) for _, samples in part)
    together = []
    for index, sample in mix(config, [flat(part) for part in parts], seed):
        tallies[index].num_not_drawn -= 1
        together.append(sample)
    return together


def hold_out(
    parts: Sequence[Sequence[Row]], tallies: Sequence[Tally], share: float, seed: int
) -> tuple[list[list[Row]], list[list[Row]]]:
    """`(training rows, held-out rows)` of each dataset. Equal records go to the same side, so none leaks.

    Raises DataError if nothing would be left to train on.
    """
    keys = list(dict.fromkeys(key for part in parts for key, _ in part))
    number = max(1, round(share * len(keys)))
    if number >= len(keys):
        raise DataError(
            f"data.validation_split {share}: of {len(keys)} different usable rows none would be left to train on"
        )
    order = np.random.default_rng((seed, _SPLIT)).permutation(len(keys))[:number]
    chosen = {keys[index] for index in order.tolist()}
    held = [[row for row in part if row[0] in chosen] for part in parts]
    for tally, rows in zip(tallies, held):
        tally.num_held_out = sum(len(samples) for _, samples in rows)
    return [[row for row in part if row[0] not in chosen] for part in parts], held
