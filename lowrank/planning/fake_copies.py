"""Copies of fake tensors that are fake too.

torch copies a tensor by copying its storage, and a fake tensor's storage has a size but no memory: what
`copy.deepcopy` of a layer then reads and writes is not its own (seen with torch 2.13 as a crash some seconds later, in
the run that was planned). Models, of transformers or of strangers, and what hangs adapters on them, copy layers while
they are built.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


@contextlib.contextmanager
def fake_copies() -> Generator[None, None, None]:
    """While this lasts, `copy.deepcopy` of a fake tensor gives a fake tensor of the same shape."""
    FakeTensor.__deepcopy__ = _copied  # type: ignore[method-assign]
    try:
        yield
    finally:
        del FakeTensor.__deepcopy__


def _copied(self: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    if id(self) not in memo:
        with torch.no_grad():
            clone: torch.Tensor = self.detach().clone()
        is_parameter = isinstance(self, nn.Parameter)
        memo[id(self)] = nn.Parameter(clone, self.requires_grad) if is_parameter else clone
    return memo[id(self)]
