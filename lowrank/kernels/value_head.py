"""The value head (score head of a reward model): its values of whole sequences and of each token."""

from __future__ import annotations

import torch


def last_token_values(hidden_TD: torch.Tensor, start_S1: torch.Tensor, value_D: torch.Tensor) -> torch.Tensor:
    """h . v for the last token of each segment: (T, D), (S + 1), (D) -> (S), in the dtype of `value_D`."""
    return hidden_TD[start_S1[1:].long() - 1].to(value_D.dtype) @ value_D


def token_values(hidden_TD: torch.Tensor, value_D: torch.Tensor) -> torch.Tensor:
    """h . v for every token: (T, D), (D) -> (T), in the dtype of `value_D`."""
    return hidden_TD.to(value_D.dtype) @ value_D
