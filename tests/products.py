"""Which 16-bit products are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_


class Products(TorchDispatchMode):
    """Shapes and strides of the operands of all products in bfloat16 but those of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _PRODUCTS:
            operands = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            if operands[0].dtype == torch.bfloat16:
                self.seen.add((*(tuple(each.shape) for each in operands), *(each.stride() for each in operands)))
        return func(*args, **(kwargs or {}))
