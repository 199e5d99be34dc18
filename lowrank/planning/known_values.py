"""Fake tensors beside tensors with values: what a model reads of small numbers, to know how large something is.

Towers for pictures read how many patches each picture has, where windows of attention end, and which tokens stand for
pictures. Those are a few integers that are known before anything computes, so they are kept as they are, and what
follows from them alone is computed; all the rest stays fake.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._pytree import tree_leaves

_aten: Any = torch.ops.aten
_SMALL = 1 << 20
"""Floats of a tensor that nothing fake went into, for it to be computed: places of patches, weights between them."""
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


class KnownValues(TorchDispatchMode):
    """Enter it after a FakeTensorMode. Tensors that nothing fake went into have values if they are integers, or few.

    Of values that are not there, none is 0, and what is asked about them is so: pixels are there, all of them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        if any(isinstance(each, FakeTensor) for each in tensors):
            return self._of_fakes(func, args, kwargs)
        if tensors and all(map(_has_values, tensors)):  # views too, which no dry run may make of them
            return self._computed(func, args, kwargs)
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True):
            dry = func(*args, **kwargs)
        results = [each for each in tree_leaves(dry) if isinstance(each, torch.Tensor)]
        known = all(map(_has_values, results)) and not (_is_empty(func) and results[0].dtype.is_floating_point)
        return self._computed(func, args, kwargs) if known else func(*args, **kwargs)

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def _of_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func is _aten.eq.Scalar and args[0].is_floating_point():
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=torch.bool, device=args[0].device)
        if _writes_into_values(func, args):
            return args[0]
        if func in _INDEXING:
            args = (args[0], [place for each in args[1] for place in _places(each)], *args[2:])
        elif func is _aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        elif func is _aten.masked_select.default:
            return args[0].new_empty(_count(args[1]))
        return func(*args, **kwargs)


def _is_empty(func: Any) -> bool:
    """Whether what it makes has no values yet: fake ones will be written there."""
    return func._schema.name.startswith("aten::empty")


def _writes_into_values(func: Any, args: Any) -> bool:
    """Whether it changes its first argument, which has values; it keeps those that it has."""
    first = func._schema.arguments[0] if func._schema.arguments else None
    changes = first is not None and first.alias_info is not None and first.alias_info.is_write
    return changes and isinstance(args[0], torch.Tensor) and not isinstance(args[0], FakeTensor)


def _has_values(tensor: torch.Tensor) -> bool:
    return not tensor.dtype.is_floating_point or tensor.numel() <= _SMALL


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as indices, as many as it has places; what they are plays no part."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    with _disable_current_modes():
        return [torch.empty(_count(index), dtype=torch.int64, device=index.device) for _ in range(index.ndim)]


def _count(mask: torch.Tensor) -> int:
    if isinstance(mask, FakeTensor):
        return mask.numel()
    with _disable_current_modes():
        return int(mask.count_nonzero())


def with_values(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device` for a pass under these modes: integers as they are, others fake."""
    if not tensor.dtype.is_floating_point:
        return tensor.to(device)
    with mode:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
