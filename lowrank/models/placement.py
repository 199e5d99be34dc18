"""Where the frozen weights of a base lie while it is trained: the seam between a base and what moves its weights.

    Whole      all of them on the device that computes, which is as a rule
    Sharded    a part on each device, whole for the moment a layer computes (sharded.py, FSDP2)
    Streamed   once in host memory, on the device for the moment a layer computes (streamed.py)

A placement is told of every decoder layer as soon as its weights are read, so that never more than one layer is whole
beside what is kept; where the checkpoint is packed already, its bytes are still in the files (`unread`), and it reads
those that it keeps. Whoever reads weights outside a pass does it inside `reading`, and the head's inside `head`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.models.layers import decoder_layers
from lowrank.models.plain_linear import is_plain_linear
from lowrank.models.storages.dense import DenseLinear

Reading = Callable[[str], None]
"""`(full name of a module of the model)`: its weights can be read from now until the next name."""


class Placement(Protocol):
    """What moves a base's weights. All that is asked before `finish` comes from loading."""

    device: torch.device
    """Where the base computes."""
    moves_layers: bool
    """Weights of decoder layers are not there between passes, so no tensor of them may be held."""
    shares_head: bool
    """Nor are those of the embedding and the head."""
    in_step: bool
    """All ranks must make the same passes at the same time."""

    def keep(self, layer: nn.Module) -> None:
        """All weights of a decoder layer are there, frozen, or `unread`: put them where they are kept."""
        ...

    def finish(self, model: Any, backbone: nn.Module, layers: nn.ModuleList) -> None:
        """The model is loaded, and every layer kept: see to the rest of it."""
        ...

    def reading(self) -> AbstractContextManager[Reading]:
        """Weights of one decoder layer after the other are read."""
        ...

    def head(self) -> AbstractContextManager[object]:
        """The weight of the head is read."""
        ...

    def head_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """(V, D) and the bias (V), the same tensors at all times, with their values inside `head`; None: the module's
        own."""
        ...


class Whole:
    """Everything is where it computes."""

    moves_layers = shares_head = in_step = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def keep(self, layer: nn.Module) -> None:
        """It lies there."""

    def finish(self, model: Any, backbone: nn.Module, layers: nn.ModuleList) -> None:
        """Nothing is left."""

    @contextmanager
    def reading(self) -> Generator[Reading]:
        """They can be read at any time."""
        yield lambda name: None

    def head(self) -> AbstractContextManager[object]:
        """So can it."""
        return nullcontext()

    def head_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The module's own."""
        return None


class StoredBytes(Protocol):
    """A tensor in a file."""

    @property
    def nbytes(self) -> int:
        """In the file."""
        ...

    def part(self, first: int, size: int) -> torch.Tensor:
        """`size` bytes from its byte `first`."""
        ...


def leave_unread(module: nn.Module, buffers: Mapping[str, StoredBytes]) -> nn.Module:
    """The module, whose buffers of these names are on the meta device until somebody reads their bytes."""
    module._unread = dict(buffers)  # pyright: ignore[reportArgumentType] (a plain attribute, no tensor)
    return module


def unread(module: Any) -> dict[str, StoredBytes]:
    """What is still in the file, by the name of the module's own tensor."""
    return getattr(module, "_unread", {})


def all_read(module: nn.Module) -> None:
    """Nothing is unread any more."""
    for each in module.modules():
        if unread(each):
            del each._unread


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a model can be read now: it is whole, and here."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
    return plain and (not tensor.numel() or tensor.untyped_storage().nbytes() > 0)


def whole_tensor(tensor: Any) -> torch.Tensor:
    """A tensor of a model's state dict, gathered if this rank has a part of it: then every rank asks for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def move_rest(model: Any, device: torch.device) -> None:
    """Move what is in no decoder layer to the device; those are where they are kept."""
    layers = decoder_layers(model)
    kept = {module for layer in layers or () for module in layer.modules()}
    for module in model.modules():
        if module not in kept:
            _move(module, device)


@torch.no_grad()
def move_layer(layer: nn.Module, device: torch.device) -> None:
    """Move a decoder layer to the device, but for what is unread."""
    for module in layer.modules():
        _move(module, device)


def _move(module: nn.Module, device: torch.device) -> None:
    left = unread(module)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name not in left:
            setattr(module, name, buffer.to(device))


def with_own_linears(layer: nn.Module) -> None:
    """Put a module of ours around the parameters of each linear layer now, so that an adapter which comes later finds
    it there: parameters that are moved about have to stay in the module they were in."""
    for name, module in list(layer.named_modules()):
        if name and isinstance(module, (nn.Linear, Conv1D)) and is_plain_linear(type(module)):
            layer.set_submodule(name, DenseLinear(module))
