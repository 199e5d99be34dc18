"""Which rows of the running batch belong to which adapter.

A `ForwardContext` says so for one pass and is never changed. The engine opens it (`Routing.using`) around the forward
and the backward pass, since recomputed layers read it again; outside of any pass all rows are the bare base's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace

import torch

from lowrank.errors import ModelError
from lowrank.kernels.counter_random import key_of

_SPREAD = 0x9E3779B1
"""Rows that a layer sees for one routed one have counters far from those of the next."""


@dataclass(frozen=True)
class RngKey:
    """What a slot's random numbers are a function of: its job's seed and optimizer step. None of it: no dropout, no
    noise."""

    seed: int
    step: int
    neftune_alpha: float = 0.0


@dataclass(frozen=True)
class VirtualTokenRows:
    """Rows [row, row + number) of a packed batch are virtual tokens [place, place + number) of a slot."""

    slot: int
    row: int
    place: int
    number: int


@dataclass(frozen=True)
class ForwardContext:
    """What the layers of one forward pass, and of its backward pass, know about its rows: `num_rows` rows;
    `(slot, first row, end row)` for those that are not plainly the base's.

    A layer may see k rows for each routed one (sequences of k tokens). `counter_N` and `length_N` (draw counter of each
    row, length of its sequence) are needed with `rng_keys`.
    """

    num_rows: int = 0
    ranges: tuple[tuple[int, int, int], ...] = ()
    counter_N: torch.Tensor | None = None
    length_N: torch.Tensor | None = None
    rng_keys: Mapping[int, RngKey] = field(default_factory=dict)
    virtual: tuple[VirtualTokenRows, ...] = ()
    decoding: bool = False
    """The rows are tokens of answers in progress: few of each slot, and the same slots in many batches."""
    group_T: torch.Tensor | None = None
    """While compiled layers answer: which of the adapters side by side each row has, -1 for none (see
    `RoutedLinear.put_side_by_side`)."""

    def __post_init__(self) -> None:
        # The bare base has no adapter, but its own parameters may be in training, with noise.
        own = tuple(entry for entry in self.ranges if entry[0] >= 0 or entry[0] in self.rng_keys)
        object.__setattr__(self, "ranges", own)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> ForwardContext:
        """The same context with other tensors: `move` of each."""
        counter_N, length_N = (None if each is None else move(each) for each in (self.counter_N, self.length_N))
        return replace(self, counter_N=counter_N, length_N=length_N)

    def in_rows_of(self, total: int, layer: str) -> list[tuple[int, int, int]]:
        """The ranges in a layer's own rows, of which there are `total`."""
        if not self.ranges:
            return []
        each = _rows_of_a_token(total, self.num_rows, layer)
        return [(slot, first * each, end * each) for slot, first, end in self.ranges]

    def groups_of_rows(self, total: int, layer: str) -> torch.Tensor:
        """`group_T` of a layer's own rows, of which there are `total`."""
        assert self.group_T is not None, "a pass of compiled layers"
        each = _rows_of_a_token(total, len(self.group_T), layer)
        return self.group_T if each == 1 else self.group_T.repeat_interleave(each)

    def counters(self, total: int) -> torch.Tensor | None:
        """The draw counter of each row of a layer that sees `total`; None where nothing is drawn."""
        counter_N = self.counter_N
        if counter_N is None or len(counter_N) == total:
            return counter_N
        place = torch.arange(total // len(counter_N), device=counter_N.device)
        return (counter_N[:, None] * _SPREAD + place).reshape(-1)

    def key(self, slot: int, layer: str) -> int | None:
        """The key of a slot's random numbers at `layer`; None where nothing is drawn."""
        rng_key = self.rng_keys.get(slot)
        return None if rng_key is None else key_of(rng_key.seed, rng_key.step, layer)


class Routing:
    """Where the routed layers of a bank, inside somebody else's model, find the context of the pass they are in."""

    def __init__(self, context: ForwardContext | None = None) -> None:
        self.current = context or ForwardContext()

    @contextlib.contextmanager
    def using(self, context: ForwardContext) -> Generator[None, None, None]:
        """Passes in here are of `context`; a backward pass that computes layers again belongs in here too."""
        before, self.current = self.current, context
        try:
            yield
        finally:
            self.current = before


def _rows_of_a_token(total: int, tokens: int, layer: str) -> int:
    """How many rows each token has in a layer that sees `total`."""
    each = total // tokens  # torch.compile knows no divmod of sizes
    if total % tokens or not each:
        raise ModelError(
            f"{layer} sees {total} of {tokens} tokens (an expert of a mixture?), so it cannot carry an adapter; name "
            "it in adapter.exclude_modules"
        )
    return each
