"""Which subclasses of a linear layer compute what it does."""

from __future__ import annotations

import functools

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@functools.cache
def is_plain_linear(kind: type[nn.Module]) -> bool:
    """Whether a subclass of a linear layer computes x W^T + b too; found out by trying (Llama 4's router does not)."""
    if kind in (nn.Linear, Conv1D):
        return True
    try:
        with torch.device("cpu"), torch.no_grad():  # models are on meta here
            tried, x_TD = kind(3, 2).float(), torch.linspace(-1, 1, 12).view(4, 3)
            for parameter in tried.parameters():
                parameter.copy_(torch.linspace(-1, 2, parameter.numel()).view_as(parameter))
            assert isinstance(tried.weight, torch.Tensor)
            ours_TO = nn.functional.linear(x_TD, tried.weight, getattr(tried, "bias", None))
            return torch.allclose(tried(x_TD), ours_TO, rtol=1e-5, atol=1e-6)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
