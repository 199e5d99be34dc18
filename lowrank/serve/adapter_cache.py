"""The adapter cache of multi-LoRA serving (dynamic LoRA loading): any number registered, the most recent in memory.

An adapter comes from a folder, once it is asked for; when there are too many in memory, the one that was not asked
for the longest leaves, after the last of its answers. What comes back into memory is what the folder holds then, in
a slot of its own (generate/adapter_registry.py), so no key or value of other weights is ever read.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lowrank.checkpoints.adapter_folder import adapters_in
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.peft_layout import AdapterOnDisk, load_adapter
from lowrank.errors import ModelError
from lowrank.generate.adapter_registry import AdapterRegistry
from lowrank.generate.embedding import Pooling
from lowrank.generate.generation import Generation
from lowrank.generate.request import GenerationConfig
from lowrank.segments import Media
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.folders import adapter_within, unknown_model

_ATTEMPTS = 3
"""A run that trains on replaces its folders; a reader who comes in that instant looks again."""


@dataclass(frozen=True)
class Registered:
    """Where an adapter comes from, and how often it was published."""

    folder: Path
    version: int
    created: int


class AdapterCache:
    """All methods may be called from any thread."""

    def __init__(
        self, published: AdapterRegistry, folders: Mapping[str, Path], roots: Sequence[Path], *, max_loras: int
    ) -> None:
        """`folders`: of the adapters that `published` has already. `roots`: nothing outside them is ever read."""
        self.published = published
        self.roots = tuple(root.resolve() for root in roots)
        self.max_loras = max_loras
        now = int(time.time())
        self.always = tuple(name for name in published.names if name not in folders)
        """The base, and what has no folder to come back from."""
        self._registered = {name: Registered(folder, 1, now) for name, folder in folders.items()}
        self._resident: OrderedDict[str, None] = OrderedDict.fromkeys(folders)
        self._pins: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._loading = threading.Lock()
        self._evict()

    @property
    def names(self) -> list[str]:
        """The base first."""
        with self._lock:
            return [*self.always, *self._registered]

    def registered(self) -> dict[str, tuple[Registered, bool]]:
        """With whether it is in memory."""
        with self._lock:
            return {name: (entry, name in self._resident) for name, entry in self._registered.items()}

    def register_all(self, root: Path) -> list[str]:
        """Make every adapter folder in `root` known by its name, without loading; those that were not known."""
        found = adapters_in(root)
        with self._lock:
            new = {name: place for name, place in found.items() if name not in self.names}
            now = int(time.time())
            self._registered |= {name: Registered(place, 1, now) for name, place in new.items()}
        return list(new)

    def submit(
        self,
        name: str,
        token_L: np.ndarray,
        config: GenerationConfig,
        stop_tokens: frozenset[int],
        media: Media | None = None,
    ) -> Generation:
        """Ask `name`, which comes into memory if it is not there. ApiError for an unknown name."""
        with self._pinned(name):
            return self.published.submit(name, token_L, config, stop_tokens=stop_tokens, media=media)

    def embed(self, name: str, token_L: np.ndarray, pooling: Pooling) -> np.ndarray:
        """A text as `name` reads it. ApiError for an unknown name."""
        with self._pinned(name):
            return self.published.embed(name, token_L, pooling)

    def publish(self, name: str, path: str) -> None:
        """Register and load an adapter, or a new version of one. ApiError for a path outside the roots."""
        if name in self.always:
            raise ApiError(400, f"{name!r} is the base and cannot be replaced", param="name")
        folder = adapter_within(self.roots, path)
        with self._loading:
            self._load(name, folder)
            with self._lock:
                before = self._registered.get(name)
                version = before.version + 1 if before else 1
                self._registered[name] = Registered(folder, version, int(time.time()))
                self._make_room(name)

    def unpublish(self, name: str) -> None:
        """Forget an adapter; what it is answering it answers to the end."""
        with self._loading, self._lock:
            if name in self.always:
                raise ApiError(400, f"{name!r} is the base and cannot be taken away", param="name")
            if name not in self._registered:
                raise unknown_model(name, self.names)
            del self._registered[name]
            if name in self._resident:
                del self._resident[name]
                self.published.unpublish(name)

    @contextmanager
    def _pinned(self, name: str) -> Generator[None, None, None]:
        """It is in memory, and stays."""
        if name in self.always:
            yield
            return
        with self._lock:
            self._pins[name] += 1
        try:
            if not self._touch(name):
                with self._loading:  # another may have brought it meanwhile
                    if not self._touch(name):
                        self._bring(name)
            yield
        finally:
            with self._lock:
                self._pins[name] -= 1
                if not self._pins[name]:
                    del self._pins[name]

    def _touch(self, name: str) -> bool:
        """Whether it is in memory; then it is the latest that was asked for."""
        with self._lock:
            if name not in self._registered:
                raise unknown_model(name, self.names)
            if name in self._resident:
                self._resident.move_to_end(name)
                return True
            return False

    def _bring(self, name: str) -> None:
        entry = self._registered[name]
        self._load(name, entry.folder)
        with self._lock:
            self._registered[name] = replace(entry, created=int(time.time()))
            self._make_room(name)

    def _load(self, name: str, folder: Path) -> None:
        adapter = _read(folder)
        try:
            adapter = on_model(adapter, self.published.generator.bank.base.model)
        except ModelError as error:
            raise ApiError(400, f"{name}: {error}", param="path") from error
        self.published.publish(name, adapter.config, adapter.tensors)

    def _make_room(self, name: str) -> None:
        self._resident[name] = None
        self._resident.move_to_end(name)
        self._evict()

    def _evict(self) -> None:
        surplus = len(self._resident) - self.max_loras
        for name in [name for name in self._resident if not self._pins[name]][: max(0, surplus)]:
            del self._resident[name]
            self.published.unpublish(name)


def _read(folder: Path) -> AdapterOnDisk:
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return load_adapter(folder)
        except (OSError, ModelError) as error:
            if attempt == _ATTEMPTS:
                raise ApiError(400, f"the adapter cannot be read: {error}", param="path") from error
            time.sleep(0.1)
    raise AssertionError
