"""Mixed precision for full fine-tuning: the base computes in 16 bits, float32 master weights are trained.

As with an adapter's masters and working copies (adapters/bank.py): a 16-bit weight loses updates smaller than 1/256 of
itself, and a 16-bit gradient loses micro-batches, so each parameter's gradient is added to its master's in float32 as
soon as it is complete, and the weights are written back once per step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from lowrank.kernels.precision import float32_or_wider


class MasterWeights:
    """Float32 masters of `parameters`; those that are float32 or wider are their own masters.

    With `in_parts` nothing is trained until `train` names it; masters of the other weights share their memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], in_parts: bool = False) -> None:
        self.parameters: dict[str, nn.Parameter] = {}
        self._weights = dict(parameters)
        for name, parameter in parameters.items():
            if float32_or_wider(parameter.dtype) == parameter.dtype:
                self.parameters[name] = parameter
                continue
            value = parameter.detach() if in_parts else parameter.detach().to(float32_or_wider(parameter.dtype))
            self.parameters[name] = master = nn.Parameter(value)
            parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))

    @torch.no_grad()
    def train(self, names: Collection[str]) -> None:
        """Train these parameters from now on, and no others, whose masters are rounded to the weights."""
        self.refresh()
        for name, weight in self._weights.items():
            wanted, master = name in names, self.parameters[name]
            weight.requires_grad_(wanted)
            if master is weight:
                continue
            if wanted and master.dtype == weight.dtype:
                master.data = weight.detach().to(float32_or_wider(weight.dtype))
            elif not wanted:
                master.data = weight.detach()
            master.requires_grad_(wanted)

    @torch.no_grad()
    def write_back(self, name: str) -> None:
        """Copy one master to its weight; parameters that have none are left alone."""
        weight = self._weights.get(name)
        if weight is not None and self.parameters[name] is not weight:
            weight.copy_(self.parameters[name])

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy all masters to their weights."""
        pairs = [(weight, self.parameters[name]) for name, weight in self._weights.items()]
        wide = [(weight, master) for weight, master in pairs if master.dtype != weight.dtype]
        if wide:
            narrow, masters = map(list, zip(*wide))
            torch._foreach_copy_(narrow, masters)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]


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
