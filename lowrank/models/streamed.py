"""A frozen base in host memory, whose decoder layers come to the device while they compute: one packed copy, in memory
that is pinned for the transfer.

    forward    layer i computes, i + 1 is on its way, i - 1 is let go of
    backward   layer i computes, i - 1 is on its way, i + 1 is let go of

So two layers are on the device at a time, with the embedding, the head and what is small (norms, biases), which stay.
What is frozen is never written back. On a GPU the copies run on a stream of their own; on a CPU they are plain copies,
which gain nothing and show that the results are the same bits.

A layer's matrices lie in one block, on the host and on the device. The device's storage is the same object at all
times, empty or not: whatever autograd has kept a view of is there again when the layer is.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lowrank.models.host_blocks import HostBlocks, OwnBlocks
from lowrank.models.placement import Reading, StoredBytes, all_read, unread, with_own_linears

_ALIGNED = 256
"""Bytes: what kernels like matrices to begin at, and more than a CPU's do."""


class Streamed:
    """See Placement."""

    moves_layers = True
    shares_head = in_step = False

    def __init__(self, device: torch.device, memory: HostBlocks | None = None) -> None:
        """`memory`: host memory for its layers; None: this process's own."""
        self.device = device
        self._way = _Way(device)
        self._memory = memory or OwnBlocks(pin=self._way.on_gpu)
        self._blocks: list[_Block] = []
        self._places: dict[str, int] = {}
        """The number of a decoder layer, by its full name and a dot."""
        self._of_layer: dict[nn.Module, int] = {}
        self.most_on_device = 0
        """Bytes of layers that were there at the same time."""

    def keep(self, layer: nn.Module) -> None:
        """See Placement: the layer's matrices go to the host, in one block."""
        with_own_linears(layer)
        self._of_layer[layer] = len(self._blocks)
        self._blocks.append(_Block(layer, self._way, self._memory))

    def finish(self, model: Any, backbone: nn.Module, layers: nn.ModuleList) -> None:
        """See Placement: layers are fetched before they compute, in the order in which they stand."""
        del backbone
        self._memory.done()
        names = {module: name for name, module in model.named_modules()}
        order = [self._of_layer[layer] for layer in layers]
        self._blocks = [self._blocks[index] for index in order]
        self._places = {f"{names[layer]}.": number for number, layer in enumerate(layers)}
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before_forward, number), prepend=True)
            layer.register_forward_hook(partial(self._after_forward, number))

    def _before_forward(self, number: int, layer: nn.Module, args: Any) -> None:
        del layer, args
        if not _in_backward():  # where a layer is computed again, its backward pass has fetched it
            last = number == len(self._blocks) - 1
            ahead = None if last and torch.is_grad_enabled() else (number + 1) % len(self._blocks)
            self._enter(number, ahead)

    def _after_forward(self, number: int, layer: nn.Module, args: Any, output: Any) -> None:
        del layer, args
        if torch.is_grad_enabled() and not _in_backward():
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(partial(self._before_backward, number))

    def _before_backward(self, number: int, gradient: torch.Tensor) -> None:
        del gradient
        self._enter(number, number - 1 if number else None)

    def _enter(self, number: int, ahead: int | None) -> None:
        """Layer `number` is about to compute, and `ahead` comes next."""
        for other, block in enumerate(self._blocks):
            if other not in (number, ahead):
                block.leave()
        self._blocks[number].fetch()
        self._blocks[number].wait()
        if ahead is not None:
            self._blocks[ahead].fetch()
        self.most_on_device = max(self.most_on_device, sum(block.size for block in self._blocks if block.is_there))

    @contextmanager
    def reading(self) -> Generator[Reading]:
        """See Placement."""

        def read(name: str) -> None:
            number = next((number for prefix, number in self._places.items() if name.startswith(prefix)), None)
            if number is not None:
                self._enter(number, None)

        yield read

    def head(self) -> AbstractContextManager[object]:
        """See Placement: it stays on the device."""
        return nullcontext()

    def head_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """See Placement: the module's own."""
        return None


class _Way:
    """From the host to the device: a stream for copies, which on a CPU there is not."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if self.on_gpu else None
        self._left: Any = None

    @contextmanager
    def copying(self) -> Generator[None]:
        """What is copied inside may take the memory of any layer that was left: only when all is computed that was
        begun with it."""
        with torch.cuda.stream(self._stream) if self.on_gpu else nullcontext():
            if self._left is not None:
                self._stream.wait_event(self._left)
            yield

    def arrived(self) -> Any:
        """What has been copied so far, for whoever waits for it; None: it is there."""
        return self._stream.record_event() if self.on_gpu else None

    def leave(self) -> None:
        """A layer is let go of."""
        if self.on_gpu:
            self._left = self.computing().record_event()

    def computing(self) -> Any:
        """The stream of the base's device in which it computes; another device may be the current one."""
        return torch.cuda.current_stream(self.device)


class _Block:
    """The matrices of one layer."""

    def __init__(self, layer: nn.Module, way: _Way, memory: HostBlocks) -> None:
        found = _matrices(layer)
        sources = [unread(module).get(name, tensor) for module, name, tensor in found]
        offsets, size = [], 0
        for _, _, tensor in found:
            offsets.append(size)
            size += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
        self.size = size
        self._way = way
        packed_here = all(isinstance(each, torch.Tensor) for each in sources)
        self._host = memory.block(size, partial(_fill, sources, offsets), compare=packed_here)
        all_read(layer)
        self._device = torch.empty(size, dtype=torch.uint8, device=way.device)
        self.is_there = True
        self._arrived: Any = None
        for (module, name, tensor), offset in zip(found, offsets):
            nbytes = tensor.numel() * tensor.element_size()
            view = self._device[offset : offset + nbytes].view(tensor.dtype).view(tensor.shape)
            if isinstance(tensor, nn.Parameter):
                tensor.data = view
            else:  # `data`: a tensor of its own, as a parameter's are, whose version no copy changes
                setattr(module, name, view.data)
        self.leave()

    def fetch(self) -> None:
        """Begin to bring it, if it is not there."""
        if self.is_there:
            return
        self.is_there = True
        with self._way.copying():
            self._device.untyped_storage().resize_(self.size)
            self._device.copy_(self._host, non_blocking=True)
            self._arrived = self._way.arrived()

    def wait(self) -> None:
        """What is computed from now on finds it there."""
        if self._arrived is not None:
            self._way.computing().wait_event(self._arrived)

    def leave(self) -> None:
        """Let go of its memory."""
        if not self.is_there:
            return
        self.is_there = False
        self._way.leave()
        self._device.untyped_storage().resize_(0)


def _fill(sources: list[torch.Tensor | StoredBytes], offsets: list[int], block: torch.Tensor) -> None:
    """The bytes of tensors, or of their files, and zeros between them."""
    block.zero_()
    for source, offset in zip(sources, offsets):
        if isinstance(source, torch.Tensor):
            flat = source.detach().contiguous().reshape(-1).view(torch.uint8)
        else:
            flat = source.part(0, source.nbytes)
        block[offset : offset + len(flat)].copy_(flat)


def _matrices(layer: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """What is worth the way: the tensors of linear layers in any storage, and fused experts."""
    found = []
    for module in layer.modules():
        linear = hasattr(module, "dense_weight")
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if (linear and name != "bias" and tensor.ndim) or tensor.ndim > 2:
                found.append((module, name, tensor))
    return found


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # pyright: ignore[reportPrivateUsage] (torch's own checkpoint asks so)
