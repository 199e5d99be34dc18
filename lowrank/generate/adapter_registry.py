"""Publishes, replaces and unpublishes named adapters on a running generator.

A new version of an adapter comes into a slot of its own. Answers that are on their way end with the
version they began with; what is asked afterwards gets the new one; the old slot is freed with its last answer.
So no key of one version is ever read by another, and nobody waits.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

import numpy as np
import torch

from lowrank.adapters.variants import AdapterConfig
from lowrank.batches import BASE_SLOT
from lowrank.errors import did_you_mean
from lowrank.generate.embedding import Pooling, embed
from lowrank.generate.generation import Generation
from lowrank.generate.generator import Generator
from lowrank.generate.request import GenerationConfig, Prompt, RequestError, TokenChunk
from lowrank.segments import Media


class AdapterRegistry:
    """The names one may ask. All methods may be called from any thread."""

    def __init__(self, generator: Generator, slots: Mapping[str, int]) -> None:
        """`slots`: what is in the bank already, by name; the bare base under its name too."""
        self.generator = generator
        self._slots = dict(slots)
        self._users: Counter[int] = Counter()
        self._retired: set[int] = set()
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """In the order they came."""
        with self._lock:
            return list(self._slots)

    def submit(
        self,
        name: str,
        token_L: np.ndarray,
        config: GenerationConfig,
        *,
        stop_tokens: frozenset[int] = frozenset(),
        media: Media | None = None,
    ) -> Generation:
        """Ask the current version of `name`. Raises RequestError, also for a name that is not there."""
        with self._lock:
            slot = self._slot_of(name)
            generation = self.generator.submit(Prompt(token_L, slot, media), config, stop_tokens=stop_tokens)
            self._users[slot] += 1
        generation.listen(lambda chunk: self._on_chunk(slot, chunk))
        return generation

    def embed(self, name: str, token_L: np.ndarray, pooling: Pooling) -> np.ndarray:
        """(D) A text's vector by the current version of `name`, made between two steps. Raises RequestError."""
        bank = self.generator.bank
        return self.generator.between_steps(
            lambda: embed(self.generator.base, bank, self._slot_of(name), token_L, pooling)
        )

    def publish(self, name: str, config: AdapterConfig, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add an adapter, or a new version of one. ModelError if it does not fit; then the old one stays."""

        def add() -> int:
            slot = self.generator.bank.add(config, seed=0)
            try:
                self.generator.bank.load(slot, tensors)
            except BaseException:
                self.generator.bank.remove(slot)
                raise
            self.generator.changed(slot)  # the number may have been another's
            return slot

        slot = self.generator.between_steps(add)
        with self._lock:
            before, self._slots[name] = self._slots.get(name), slot
        self._retire(before)

    def unpublish(self, name: str) -> None:
        """Take a name away; what it is answering it answers to the end. RequestError if it is not there."""
        with self._lock:
            if name not in self._slots or self._slots[name] == BASE_SLOT:
                raise RequestError(f"there is no adapter {name!r} to withdraw{did_you_mean(name, self._slots)}")
            slot = self._slots.pop(name)
        self._retire(slot)

    def _slot_of(self, name: str) -> int:
        with self._lock:
            if name not in self._slots:
                raise RequestError(f"there is no adapter {name!r}{did_you_mean(name, self._slots)}")
            return self._slots[name]

    def _retire(self, slot: int | None) -> None:
        with self._lock:
            if slot is None or slot == BASE_SLOT or slot in self._slots.values():
                return
            self._retired.add(slot)
        self._sweep()

    def _on_chunk(self, slot: int, chunk: TokenChunk) -> None:
        if chunk.finish is not None:
            with self._lock:
                self._users[slot] -= 1
            self._sweep()

    def _sweep(self) -> None:
        """Free the slots of old versions that nobody uses any more."""
        with self._lock:
            idle = {slot for slot in self._retired if not self._users[slot]}
            self._retired -= idle
        for slot in idle:
            self.generator.post(lambda slot=slot: self.generator.bank.remove(slot))
