"""Whose rows a pass of a model has, told to the routing before each; the passes are a trainer's, not ours."""

from __future__ import annotations

import torch

from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext, RngKey
from lowrank.batches import BASE_SLOT


class OneSlot(ForwardContext):
    """All rows of every layer are one slot's, however many a layer sees."""

    def in_rows_of(self, total: int, layer: str) -> list[tuple[int, int, int]]:
        """The whole of a layer's rows."""
        del layer
        return [(slot, 0, total) for slot, _, _ in self.ranges]

    def counters(self, total: int) -> torch.Tensor | None:
        """Of all rows of a layer: a tower's are not the text's."""
        counter_N = self.counter_N
        if counter_N is None or len(counter_N) == total:
            return counter_N
        return torch.arange(total, device=counter_N.device)


class PassRouting:
    """For one bank: the context of the pass that comes, and working copies that are up to date in it."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank
        self._fresh: set[int] = set()
        self._passes = 0

    def begin(self, slot: int, num_rows: int, device: torch.device, seed: int | None) -> None:
        """`num_rows` rows of `slot` come, which is up to date. `seed`: of its adapter, where the pass is one of
        training; else None. The context stays: the trainer, not we, knows when its backward pass is."""
        if slot == BASE_SLOT:
            self._bank.routing.current = OneSlot(num_rows)
            return
        rng_keys = None
        if seed is not None:
            self._fresh.discard(slot)  # an optimizer step may follow
            self._passes += 1
            rng_keys = {slot: RngKey(seed, self._passes)}
        counter_N = torch.arange(num_rows, device=device)
        self._bank.routing.current = OneSlot(num_rows, ((slot, 0, num_rows),), counter_N, rng_keys=rng_keys or {})

    def begin_generation(self, slot: int) -> None:
        """Passes of `slot` come that draw nothing; the tower looks before the first of the backbone."""
        self._bank.routing.current = OneSlot(1, ((slot, 0, 1),))

    def refresh(self, slot: int) -> None:
        """Bring a slot's working copies up to date, if an optimizer may have taken a step since."""
        if slot != BASE_SLOT and slot not in self._fresh:
            self._bank.refresh(slot)
            self._fresh.add(slot)

    def forget(self, slot: int | None = None) -> None:
        """A slot is gone, or (None) all may have changed."""
        self._fresh = set() if slot is None else self._fresh - {slot}
