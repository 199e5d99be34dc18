"""PEFT's module tree: where the bank's masters hang, and the head as those who multiply with it themselves see it."""

# The module tree is written into, of which torch offers only the reading.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowrank.adapters.embedding import RoutedCopy

_PEFT_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


class Tuner(nn.Module):
    """What stands between a PeftModel and the model it adapts."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, Any] = {}
        self.active_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)


class _Part(nn.Module, BaseTunerLayer):
    """What holds an adapter's tensors of one name: PEFT's functions on state dicts find them by its kind."""


class TrainedHead(RoutedCopy):
    """The head, whose `weight` is the copy of the slot whose rows come: for those who multiply with it themselves."""

    @property
    def weight(self) -> torch.Tensor:
        """In the dtype of the frozen one."""
        frozen = self.base.weight
        assert isinstance(frozen, torch.Tensor)
        own = self._own_copy()
        return frozen if own is None else own.weight.to(frozen.dtype)  # type: ignore[operator,return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """In the dtype of the frozen one."""
        frozen = getattr(self.base, "bias", None)
        own = self._own_copy()
        return frozen if own is None or frozen is None else own.bias.to(frozen.dtype)  # pyright: ignore

    def _own_copy(self) -> nn.Module | None:
        current = getattr(self.routing, "current", None)
        slots = [slot for slot, _, _ in current.ranges] if current is not None else []
        return self.copies.get(slots[0]) if len(slots) == 1 else None


def unhang(model: nn.Module, path: str, adapter: str, copies: Sequence[str]) -> None:
    """What `hang` put there goes."""
    module, leaf = model, ""
    parts, leaf = _place(path, adapter, copies)
    for part in parts:
        module = module.get_submodule(part)
    del module._parameters[leaf]


def _place(path: str, adapter: str, copies: Sequence[str]) -> tuple[list[str], str]:
    """Modules and the name of a parameter in PEFT's tree, from its name in files."""
    *parts, leaf = path.split(".")
    if any(path.startswith(f"{copy}.") for copy in copies):
        return [*parts, "modules_to_save", adapter], leaf
    if leaf == "weight":
        return [*parts, adapter], leaf
    return [*parts, leaf], adapter


def hang(model: nn.Module, path: str, parameter: nn.Parameter, adapter: str, copies: Sequence[str]) -> None:
    """Put a master into the module tree, where PEFT would have it."""
    parts, leaf = _place(path, adapter, copies)
    module = model
    for part in parts:
        if part not in module._modules:
            module.add_module(part, _Part() if part in _PEFT_PARTS else nn.Module())
        child = module._modules[part]
        assert child is not None
        module = child
    module.register_parameter(leaf, parameter)
