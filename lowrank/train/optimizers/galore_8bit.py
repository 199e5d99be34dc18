"""GaLore whose projected moments are in 8 bit: bitsandbytes' AdamW of stand-ins of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lowrank.train.optimizers import Groups
from lowrank.train.optimizers.galore import leading_vectors
from lowrank.train.optimizers.low_rank_gradients import LowRankSettings, decay, low_shape, project, project_back
from lowrank.train.optimizers.with_bitsandbytes import bytes_in_8_bit, optimizer_of_bitsandbytes


class GaLore8bitConfig(LowRankSettings):
    """`galore` with moments in 8 bit; those of fewer than 4,096 numbers stay in 32 bit."""

    paper = "arXiv:2403.03507"
    when = "as galore, with a third of its state"
    type: Literal["galore_8bit"] = "galore_8bit"

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        return GaLore8bit(self.with_projected(groups), self)

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int:
        total, moments = 0, []
        for name, parameter in parameters.items():
            projected = self.is_target(name, parameter)
            moments.append(torch.empty(low_shape(parameter, self.rank), device="meta") if projected else parameter)
            total += 4 * self.rank * min(parameter.shape) if projected else 0
        return total + bytes_in_8_bit(moments, moments=2)


class GaLore8bit(torch.optim.Optimizer):
    """A projected matrix has a stand-in of the projection's shape, which starts each step at zero: what bitsandbytes
    makes of it is the step to project back."""

    def __init__(self, groups: Groups, settings: GaLore8bitConfig) -> None:
        self.settings = settings
        defaults = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        self._stand_in: dict[torch.Tensor, torch.Tensor] = {}
        inner: Groups = []
        for group in self.param_groups:
            own = group["params"]
            if group["projected"]:
                own = [nn.Parameter(each.new_zeros(low_shape(each, settings.rank))) for each in own]
                self._stand_in.update(zip(group["params"], own))
            inner.append({"params": own, "weight_decay": 0.0 if group["projected"] else group["weight_decay"]})
        self._inner = optimizer_of_bitsandbytes(
            "AdamW8bit", inner, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
        )

    def _inner_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """What bitsandbytes updates for it: itself, or the stand-in of its projection."""
        return self._stand_in.get(parameter, parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        projections: dict[torch.Tensor, torch.Tensor] = {}
        for group, inner in zip(self.param_groups, self._inner.param_groups):
            inner["lr"] = group["lr"]
            for parameter in group["params"] if group["projected"] else ():
                if parameter.grad is not None:
                    projections[parameter] = projection = self._projection(parameter)
                    stand_in = self._stand_in[parameter].zero_()
                    stand_in.grad = project(parameter.grad, projection).contiguous()
        self._inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter] = self._inner.state[self._inner_of(parameter)]
                if parameter in projections:
                    state["projection"] = projections[parameter]
                    step = project_back(self._stand_in[parameter], projections[parameter], parameter)
                    parameter.add_(step, alpha=self.settings.scale)
                    decay(parameter, group)
                    self._stand_in[parameter].grad = None

    def _projection(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if state.get("step", 0) % self.settings.update_interval == 0:
            assert parameter.grad is not None
            return leading_vectors(parameter.grad, self.settings.rank)
        return state["projection"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Without torch's casts: 8-bit moments stay what they are."""
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, kept in state_dict["state"].items():
            parameter = ordered[index]
            state = {
                key: value.to(parameter.device) if torch.is_tensor(value) else value for key, value in kept.items()
            }
            self.state[parameter] = self._inner.state[self._inner_of(parameter)] = state
