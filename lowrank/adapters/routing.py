"""Which rows of the running batch belong to which adapter.

One `Routing` object is shared by all routed layers of a bank. The engine sets it before the forward pass
and leaves it until the backward pass has ended, since recomputed layers read it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lowrank.errors import ModelError
from lowrank.kernels.counter_random import key_of


@dataclass(frozen=True)
class Draws:
    """Where a slot's random numbers come from: its job's seed and optimiser step. None of it: no dropout, no noise."""

    seed: int
    step: int
    neftune_alpha: float = 0.0


@dataclass(frozen=True)
class Run:
    """Rows [row, row + number) of a packed batch are virtual tokens [place, place + number) of a slot."""

    slot: int
    row: int
    place: int
    number: int


@dataclass
class Routing:
    """The current batch: `num_rows` rows; `(slot, first row, end row)` for those that are not plainly the base's."""

    num_rows: int = 0
    ranges: tuple[tuple[int, int, int], ...] = ()
    counter_N: torch.Tensor | None = None
    length_N: torch.Tensor | None = None
    draws: Mapping[int, Draws] = field(default_factory=dict)
    virtual: tuple[Run, ...] = ()
    answering: bool = False
    """The rows are tokens of answers in the making: few of each slot, and the same slots in many batches."""

    def set(
        self,
        num_rows: int,
        ranges: tuple[tuple[int, int, int], ...],
        counter_N: torch.Tensor | None = None,
        length_N: torch.Tensor | None = None,
        draws: Mapping[int, Draws] | None = None,
        virtual: tuple[Run, ...] = (),
        answering: bool = False,
    ) -> None:
        """Route the batches that follow. A layer may see k rows for each routed one (sequences of k tokens).

        `counter_N` and `length_N` (draw counter of each row, length of its sequence) are needed with `draws`.
        """
        self.num_rows = num_rows
        self.counter_N, self.length_N = counter_N, length_N
        self.draws = draws or {}
        self.virtual = virtual
        self.answering = answering
        # The bare base has no adapter, but its own parameters may be in training, with noise.
        self.ranges = tuple(entry for entry in ranges if entry[0] >= 0 or entry[0] in self.draws)

    def in_rows_of(self, total: int, layer: str) -> list[tuple[int, int, int]]:
        """The ranges in a layer's own rows, of which there are `total`."""
        if not self.ranges:
            return []
        each, rest = divmod(total, self.num_rows)
        if rest or not each:
            raise ModelError(
                f"{layer} sees {total} of {self.num_rows} tokens (an expert of a mixture?), so it cannot carry an "
                "adapter; name it in adapter.exclude_modules"
            )
        return [(slot, first * each, end * each) for slot, first, end in self.ranges]

    def key(self, slot: int, layer: str) -> int | None:
        """The key of a slot's draws at `layer`; None where nothing is drawn."""
        draws = self.draws.get(slot)
        return None if draws is None else key_of(draws.seed, draws.step, layer)
