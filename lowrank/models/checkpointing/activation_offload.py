"""Activation offloading: activations of decoder layers in host memory until the backward pass.

Each storage goes over once, however many tensors are views of it, into pinned memory, and comes back
when the backward pass first asks for it. Both copies run on the compute stream, in order, so nothing
has to wait for anything. Weights stay where they are, and so do small tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

_SMALL = 64 << 10
"""Bytes; below, the copy costs more than it frees."""


class HostMemory:
    """Runs layers so that what their graph saves is in host memory."""

    def __init__(self, model: torch.nn.Module, small: int = _SMALL) -> None:
        self._model = model
        self._small = small

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; its saved tensors come back to their device one layer at a time."""
        weights = {_identity(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())}
        moved: dict[int, _Moved] = {}
        """By storage. It holds the storages until the layer has run, so that none is taken for another."""

        def pack(tensor: torch.Tensor) -> Any:
            key = _identity(tensor)
            if tensor.untyped_storage().nbytes() < self._small or key in weights:
                return tensor
            if key not in moved:
                moved[key] = _Moved(tensor)
            view = (tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
            return _View(moved[key], *view)

        with saved_tensors_hooks(pack, _unpack):
            result = function(*args)
        for each in moved.values():
            each.original = None
        return result


def _identity(tensor: torch.Tensor) -> int:
    """Of its storage: the object, not the address, which tensors without memory (plans, rehearsals) do not have."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _Moved:
    """One storage: the original while the layer runs, its copy in host memory, and the one that came back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        flat = _bytes_of(tensor.detach())
        self.original: torch.Tensor | None = flat
        self._device = tensor.device
        self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        self._host.copy_(flat, non_blocking=True)
        self._back: torch.Tensor | None = None

    def back(self) -> torch.Tensor:
        """All its bytes on the device; freed with the last saved tensor that is a view of it."""
        if self._back is None:
            self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._back.copy_(self._host, non_blocking=True)
        return self._back


@dataclass(frozen=True)
class _View:
    moved: _Moved
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _unpack(packed: Any) -> torch.Tensor:
    if not isinstance(packed, _View):
        return packed
    flat = packed.moved.back()
    empty = torch.empty(0, dtype=packed.dtype, device=flat.device)
    return empty.set_(flat.untyped_storage(), packed.offset, packed.shape, packed.stride)
