"""GaLore whose projected moments are in 8 bit: bitsandbytes' AdamW on low-rank placeholders."""

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
    """Each projected matrix has a placeholder of the projection's shape, which is zero before each step; bitsandbytes'
    update of it is projected back onto the matrix."""

    def __init__(self, groups: Groups, settings: GaLore8bitConfig) -> None:
        self.settings = settings
        defaults = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.eps, "weight_decay": 0.0}
        super().__init__(groups, defaults)
        self._placeholder: dict[torch.Tensor, torch.Tensor] = {}
        inner: Groups = []
        for group in self.param_groups:
            params = group["params"]
            if group["projected"]:
                params = [nn.Parameter(each.new_zeros(low_shape(each, settings.rank))) for each in params]
                self._placeholder.update(zip(group["params"], params))
            inner.append({"params": params, "weight_decay": 0.0 if group["projected"] else group["weight_decay"]})
        self._inner = optimizer_of_bitsandbytes(
            "AdamW8bit", inner, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps
        )

    def _inner_of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return what bitsandbytes updates: the parameter itself, or the placeholder of its projection."""
        return self._placeholder.get(parameter, parameter)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure, no loss
        del closure
        projections: dict[torch.Tensor, torch.Tensor] = {}
        for group, inner in zip(self.param_groups, self._inner.param_groups):
            inner["lr"] = group["lr"]
            for parameter in group["params"] if group["projected"] else ():
                if parameter.grad is not None:
                    projections[parameter] = projection = self._projection(parameter)
                    stand_in = self._placeholder[parameter].zero_()
                    stand_in.grad = project(parameter.grad, projection).contiguous()
        self._inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter] = self._inner.state[self._inner_of(parameter)]
                if parameter in projections:
                    state["projection"] = projections[parameter]
                    step = project_back(self._placeholder[parameter], projections[parameter], parameter)
                    parameter.add_(step, alpha=self.settings.scale)
                    decay(parameter, group)
                    self._placeholder[parameter].grad = None

    def _projection(self, parameter: nn.Parameter) -> torch.Tensor:
        state = self.state[parameter]
        if state.get("step", 0) % self.settings.update_interval == 0:
            assert parameter.grad is not None
            return leading_vectors(parameter.grad, self.settings.rank)
        return state["projection"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state without torch's casts, so that 8-bit moments keep their dtype."""
        ordered = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, kept in state_dict["state"].items():
            parameter = ordered[index]
            state = {
                key: value.to(parameter.device) if torch.is_tensor(value) else value for key, value in kept.items()
            }
            self.state[parameter] = self._inner.state[self._inner_of(parameter)] = state
