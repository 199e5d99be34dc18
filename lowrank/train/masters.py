"""Mixed precision for full-parameter tuning: the base computes in 16 bits, float32 masters are trained.

The same idea as an adapter's masters and working copies (adapters/bank.py). A 16-bit weight forgets updates
smaller than 1/256 of itself, and a 16-bit gradient forgets micro-batches; so each parameter's gradient is
added to its master's in float32 as soon as it is there, and the weights are written back once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn


class Masters:
    """Float32 masters of `parameters`; those that are float32 or wider are their own masters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._narrow: list[torch.Tensor] = []
        self._wide: list[torch.Tensor] = []
        for name, parameter in parameters.items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            if wide == parameter.dtype:
                self.parameters[name] = parameter
                continue
            master = nn.Parameter(parameter.detach().to(wide))
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
            self.parameters[name] = master
            self._narrow.append(parameter)
            self._wide.append(master)

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the masters back to the weights."""
        if self._narrow:
            torch._foreach_copy_(self._narrow, self._wide)  # pyright: ignore[reportPrivateImportUsage]


def _move_gradient_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def move(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.to(master.dtype)
        else:
            master.grad += gradient
        parameter.grad = None

    return move
