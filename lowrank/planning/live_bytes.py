"""Counts the bytes of the tensors that are alive, as torch makes and frees them."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE = torch.ops.prim.device.default
_ALIGNED = 64
"""What allocators round a block up to; matters for many small tensors only."""


class LiveBytes(TorchDispatchMode):
    """While it is entered, every operator's results are counted: once per storage, until the storage is freed.

    Works below autograd, so what its graph keeps and what backward passes make is seen; and on fake tensors as on real
    ones. `now` and `peak` are bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # half of all calls on fake tensors
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for each in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._see(each)
        return result

    @contextmanager
    def phase(self) -> Generator[_Peak, None, None]:
        """The peak within a `with` block, in `.bytes` after it."""
        before, self.peak = self.peak, self.now
        found = _Peak()
        try:
            yield found
        finally:
            found.bytes = self.peak
            self.peak = max(before, self.peak)

    @contextmanager
    def apart(self) -> Generator[_Peak, None, None]:
        """As `phase`, of work whose peak is not one of the phase around it."""
        around, self.peak = self.peak, self.now
        found = _Peak()
        try:
            yield found
        finally:
            found.bytes = self.peak
            self.peak = max(around, self.now)

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata  # pyright: ignore[reportPrivateUsage]
        known = self._alive.get(address)
        size = -(-storage.nbytes() // _ALIGNED) * _ALIGNED
        if known is not None:
            self.now += size - known[1]  # an operator may have resized it
            self._alive[address] = (known[0], size)
        else:
            self._alive[address] = (weakref.ref(storage, lambda _: self._forget(address)), size)
            self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, address: int) -> None:
        self.now -= self._alive.pop(address)[1]


class _Peak:
    bytes = 0
