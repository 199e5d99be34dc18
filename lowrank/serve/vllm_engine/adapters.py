"""Adapters as vLLM's `LoRARequest`s: every version has a name, a number and files of its own.

vLLM knows cached keys by an adapter's name and path (vllm/v1/core/kv_cache_utils.py), so a new version under the old
name would read the keys of the old one (vllm #42125). So the files are copied, and what vLLM reads again later is what
it read first. A version that was replaced or taken away is forgotten once its last answer has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank.checkpoints.atomic import current
from lowrank.checkpoints.peft_layout import load_adapter
from lowrank.errors import ModelError
from lowrank.models.config import ModelConfig
from lowrank.pipelines.adapter_on_base import on_base_of, targets_beside
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.vllm_engine.start import Vllm


@dataclass
class AdapterVersion:
    """One version of an adapter, as vLLM knows it."""

    name: str
    number: int
    """1 is the first."""
    created: int
    """Seconds since 1970."""
    request: Any
    """vLLM's `LoRARequest`."""
    folder: Path
    """Where its files were copied."""
    users: int = 0
    """Answers in progress."""
    retired: bool = False


class VllmAdapters:
    """The versions that names mean now. Its methods may be called from any thread but the event loop's."""

    def __init__(self, vllm: Vllm, loop: asyncio.AbstractEventLoop, check: Callable[[Path], None]) -> None:
        """`check` raises ModelError for a folder that vLLM would load without part of it."""
        self._vllm, self._loop, self._check = vllm, loop, check
        self._copies = tempfile.TemporaryDirectory(prefix="lowrank-vllm-")
        self._ids = itertools.count(1)
        self._versions: dict[str, AdapterVersion] = {}
        self._lock = threading.RLock()
        self._publishing = threading.Lock()

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return name in self._versions

    def versions(self) -> list[AdapterVersion]:
        """Those that answer new questions."""
        with self._lock:
            return list(self._versions.values())

    def add_all(self, adapters: Mapping[str, Path], notify: Callable[[str], None]) -> None:
        """One that vLLM cannot load keeps no other from being served. ApiError if it can load none."""
        refusals = []
        for name, folder in adapters.items():
            try:
                self.add(name, folder)
            except ApiError as refusal:
                refusals.append(refusal)
                notify(f"{name} is not served: {refusal.message}")
        if refusals and len(refusals) == len(adapters):
            raise refusals[0]

    def add(self, name: str, folder: Path) -> None:
        """Copy the files, have vLLM load them, and only then let the name mean them. ApiError if it cannot."""
        with self._publishing:
            identity = next(self._ids)
            copy = Path(self._copies.name) / str(identity)
            shutil.copytree(current(folder), copy)
            number = self._versions[name].number + 1 if name in self._versions else 1
            request = self._vllm.lora(f"{name}@{identity}", identity, str(copy))
            try:
                self._check(copy)
                asyncio.run_coroutine_threadsafe(self._vllm.llm.add_lora(request), self._loop).result()
            except Exception as error:
                shutil.rmtree(copy, ignore_errors=True)
                raise ApiError(400, f"vLLM cannot load {folder}: {error}", param="path") from error
            version = AdapterVersion(name, number, int(time.time()), request, copy)
            with self._lock:
                before, self._versions[name] = self._versions.get(name), version
            if before is not None:
                self._retire(before)

    def remove(self, name: str) -> bool:
        """Whether there was one; its answers in progress go on to their end."""
        with self._lock:
            version = self._versions.pop(name, None)
        if version is not None:
            self._retire(version)
        return version is not None

    def use(self, name: str) -> AdapterVersion | None:
        """The version that answers now, which stays until `leave`; None if there is none of that name."""
        with self._lock:
            version = self._versions.get(name)
            if version is not None:
                version.users += 1
            return version

    def leave(self, version: AdapterVersion) -> None:
        """An answer of it has ended. Also from the event loop's thread."""
        with self._lock:
            version.users -= 1
        if version.retired:
            self._retire(version)

    def close(self) -> None:
        """The copies go."""
        self._copies.cleanup()

    def _retire(self, version: AdapterVersion) -> None:
        """Have vLLM forget it, once its last answer has ended."""
        with self._lock:
            version.retired = True
            if version.users:
                return
        asyncio.run_coroutine_threadsafe(self._forget(version), self._loop)

    async def _forget(self, version: AdapterVersion) -> None:
        await self._vllm.llm.remove_lora(version.request.lora_int_id)
        shutil.rmtree(version.folder, ignore_errors=True)


def refuse_own_rows(folder: Path, model: ModelConfig) -> None:
    """ModelError for an adapter with base weights of its own in its file, which vLLM would leave out."""
    adapter = load_adapter(folder)
    what = None
    if adapter.config.trainable_token_indices:
        what = "rows of the embedding that it has trained (trainable_token_indices)"
    elif adapter.copies or on_base_of(adapter, model).copies:
        what = "an embedding, a head or another module of its own"
    elif beside := targets_beside(on_base_of(adapter, model), model):
        what = f"adapters on {beside[0]} and others beside the language model"
    if what is not None:
        raise ModelError(
            f"its file holds {what}, which vLLM leaves out: merge it (`lowrank export --to merged`), or serve with "
            "--engine torch"
        )
