"""How frozen weights are kept: one file each, all the same to the rest of the system.

A storage file has a settings class with `type` whose `wrap(linear)` returns a `BaseLinear`, and whose
`bytes_of(shape, itemsize)` says, without a weight, what it keeps of one (itemsize: bytes of a number in the compute
dtype). Adapter variants, the routed linear and merging see only that protocol, so variants and storages never multiply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from lowrank.settings import choice_of


class BaseLinear(Protocol):
    """A frozen linear map y = x W^T + b, however W is kept."""

    in_features: int
    out_features: int

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, O), in the dtype of `x_TD`."""
        ...

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D) in the compute dtype. May be a scratch buffer: read it before the next call, never keep it."""
        ...


def bias_of(base: BaseLinear) -> torch.Tensor | None:
    """The frozen bias, where the layer has one."""
    return getattr(base, "bias", None)


if TYPE_CHECKING:

    class StorageConfig(Protocol):
        """What every storage's settings class offers."""

        @property
        def type(self) -> str: ...

        def wrap(self, linear: torch.nn.Module) -> Any: ...

        def bytes_of(self, shape: tuple[int, int], itemsize: int = 2) -> int: ...
else:
    StorageConfig = choice_of(__name__, default="dense", page="docs/add-a-storage.md")
