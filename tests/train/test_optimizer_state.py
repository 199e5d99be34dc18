"""What the planner is told of an optimizer's state is what the optimizer keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowrank.train.optimizers.adamw import AdamWConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adamw_keeps_what_it_says(dtype: torch.dtype) -> None:
    parameters = {str(size): nn.Parameter(torch.randn(size, 16).to(dtype)) for size in (2, 4, 32)}
    settings = AdamWConfig()
    optimizer = settings.build(parameters)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert all(tensor.numel() == 1 or tensor.nbytes % 64 == 0 for tensor in kept)
    assert settings.state_bytes(parameters) == sum(max(64, tensor.nbytes) for tensor in kept)
