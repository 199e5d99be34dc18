"""Several datasets as one: all of them, drawn by weight, and a part held out (the validation set)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import numpy as np

from lowrank.data.batching.dataloader import Sample
from lowrank.data.config import DataConfig
from lowrank.data.report.row_counts import RowCounts
from lowrank.errors import DataError

_SPLIT, _MIX = 1, 2
"""What the seed is used for, beside `max_samples`."""

Row = tuple[int, tuple[Sample, ...]]
"""Digest of a record, and its samples."""


def flat(rows: Iterable[Row]) -> Iterator[Sample]:
    """The samples without their digests."""
    return chain.from_iterable(samples for _, samples in rows)


def mix(config: DataConfig, parts: Sequence[Callable[[], Iterator[Sample]]], seed: int) -> Iterator[tuple[int, Sample]]:
    """`(dataset, sample)` of the training datasets, each of which `parts` begins anew: one after another, or drawn by
    weight until one is used up, or all."""
    if config.mix == "concat" or len(parts) == 1:
        for index, part in enumerate(parts):
            yield from ((index, sample) for sample in part())
        return
    weight_P = np.array([source.weight for source in config.train], np.float64)
    generator = np.random.default_rng((seed, _MIX))
    running = [part() for part in parts]
    heads = [next(part, None) for part in running]
    empty = [head is None for head in heads]
    ended = list(empty)
    while not (all(ended) or (config.mix == "interleave" and any(ended))):
        drawn_P = np.where(ended if config.mix == "interleave_once" else empty, 0.0, weight_P)
        bounds = np.cumsum(drawn_P)
        index = int(np.searchsorted(bounds, generator.random() * bounds[-1], side="right"))
        sample = heads[index]
        assert sample is not None
        yield index, sample
        heads[index] = next(running[index], None)
        if heads[index] is None:
            ended[index] = True
            if config.mix == "interleave_over":
                running[index] = parts[index]()
                heads[index] = next(running[index], None)


def put_together(
    config: DataConfig, parts: Sequence[Sequence[Row]], all_row_counts: Sequence[RowCounts], seed: int
) -> list[Sample]:
    """`mix` of datasets in memory; counts what is not drawn."""
    for row_counts, part in zip(all_row_counts, parts):
        row_counts.num_not_drawn = sum(len(samples) for _, samples in part)
    together = []
    for index, sample in mix(config, [partial(flat, part) for part in parts], seed):
        all_row_counts[index].num_not_drawn = max(
            0, all_row_counts[index].num_not_drawn - 1
        )  # drawn again, it is not drawn more
        together.append(sample)
    return together


def hold_out(
    parts: Sequence[Sequence[Row]], all_row_counts: Sequence[RowCounts], share: float, seed: int
) -> tuple[list[list[Row]], list[list[Row]]]:
    """`(training rows, held-out rows)` of each dataset; `share`: or, from 1 on, a number of rows. Equal records go to
    the same side, so none leaks.

    Raises DataError if nothing would be left to train on.
    """
    keys = list(dict.fromkeys(key for part in parts for key, _ in part))
    number = int(share) if share >= 1 else max(1, round(share * len(keys)))
    if number >= len(keys):
        raise DataError(
            f"data.validation_split {share}: of {len(keys)} different usable rows none would be left to train on"
        )
    order = np.random.default_rng((seed, _SPLIT)).permutation(len(keys))[:number]
    chosen = {keys[index] for index in order.tolist()}
    held = [[row for row in part if row[0] in chosen] for part in parts]
    for row_counts, rows in zip(all_row_counts, held):
        row_counts.num_held_out = sum(len(samples) for _, samples in rows)
    return [[row for row in part if row[0] not in chosen] for part in parts], held
