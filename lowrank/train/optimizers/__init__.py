"""Optimizers: one file each, found by its name.

A file has a settings class (an `OptimizerSettings` with `type`) whose `make(groups)` returns a torch optimizer. From
torch and from living libraries where there is one; written here only where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from lowrank.settings import NonNegative, Settings, choice_of

Groups = list[dict[str, Any]]
"""torch's parameter groups; each also has `names`, `weight_decay`, `lr_factor` and `head_dim`."""


@runtime_checkable
class BlockwiseOptimizer(Protocol):
    """An optimizer that updates one block of parameters at a time."""

    def set_block_callback(self, train: Callable[[Collection[str]], None]) -> None:
        """Have `train` called with the names of the parameters of the active block, now and at every change."""
        ...


@runtime_checkable
class HasEvalWeights(Protocol):
    """An optimizer that averages its steps: evaluated and saved weights are other values than those that it trains."""

    def eval(self) -> None:
        """Put the averaged weights into the parameters."""
        ...

    def train(self) -> None:
        """Put the trained weights back into the parameters."""
        ...


class OptimizerSettings(Settings):
    """Settings every optimizer shares."""

    paper: ClassVar[str] = ""
    """Where the method is described."""
    when: ClassVar[str] = ""
    """When a person would choose it, in a few words."""
    not_for_adapters: ClassVar[str | None] = None
    """Why it makes no sense for the matrices of an adapter, if it does not."""
    has_own_schedule: ClassVar[bool] = False
    """Whether it takes the place of a learning-rate schedule."""

    is_blockwise: ClassVar[bool] = False
    """Whether its optimizer is a `BlockwiseOptimizer`."""

    may_be_layerwise: ClassVar[bool] = False
    """Whether it looks at one parameter at a time, so that `layerwise` is possible."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate; LoRA likes about ten times what full fine-tuning likes."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay. Norms and biases are left out, as in transformers."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the job's own gradient to this norm; null: never."""
    layerwise: bool = False
    """With tuning full or freeze: update each parameter within the backward pass and drop its gradient, so that the
    model's gradients are never there at once. The same numbers, without clipping (`max_grad_norm: null`), and it saves
    memory only where a step is one forward pass. A gradient that is not finite leaves its own parameter as it was."""
    max_skipped_steps: NonNegative = 5
    """A step whose loss or gradient is not finite is skipped; after this many in a row the job stops, the others go
    on."""

    @model_validator(mode="after")
    def _layerwise_fits(self) -> Self:
        if self.layerwise and not self.may_be_layerwise:
            raise ValueError(
                f"layerwise: {getattr(self, 'type', 'it')} looks at more than one parameter at a time; choose adamw, "
                "adamw_8bit, adafactor, sgd, galore, galore_8bit or apollo"
            )
        if self.layerwise and self.max_grad_norm is not None:
            raise ValueError(
                "layerwise: parameters are updated before the norm of the whole gradient is known, so it cannot be "
                "clipped; set max_grad_norm: null"
            )
        return self

    def build(
        self,
        parameters: Mapping[str, nn.Parameter],
        factors: Sequence[float] | None = None,
        undecayed: Collection[str] = (),
        head_dim: int | None = None,
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one job's parameters, by name. `factors`: a factor of the learning rate for each
        parameter; `undecayed`: names of parameters without weight decay; `head_dim`: of the base's attention.
        ConfigError if its library is not installed."""
        groups = self._groups(parameters, factors, undecayed)
        return self.make([{**group, "head_dim": head_dim} for group in groups])

    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """Return the optimizer of these parameter groups."""
        raise NotImplementedError

    def notes(self, device: torch.device) -> list[str]:
        """Return notices about the optimizer on this device."""
        del device
        return []

    def state_bytes(self, parameters: Mapping[str, nn.Parameter]) -> int | None:
        """Return the bytes of its state for these parameters; None where the memory planner can simulate a step
        instead."""
        del parameters
        return None

    def _groups(
        self, parameters: Mapping[str, nn.Parameter], factors: Sequence[float] | None, undecayed: Collection[str]
    ) -> Groups:
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for index, (name, parameter) in enumerate(parameters.items()):
            factor = factors[index] if factors else 1.0
            decay = 0.0 if name in undecayed else self.weight_decay
            empty = {"params": [], "names": [], "weight_decay": decay, "lr_factor": factor}
            group = groups.setdefault((factor, decay), empty)
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())


def split(groups: Groups, chosen: Callable[[str, nn.Parameter], bool]) -> tuple[Groups, Groups]:
    """Return `(groups of the chosen parameters, groups of the others)`, without empty groups."""
    parts: tuple[Groups, Groups] = ([], [])
    for group in groups:
        for part, wanted in zip(parts, (True, False)):
            pairs = zip(group["names"], group["params"])
            matching = [(name, each) for name, each in pairs if chosen(name, each) is wanted]
            if matching:
                names, parameters = map(list, zip(*matching))
                part.append({**group, "names": names, "params": parameters})
    return parts


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of the next step, times each group's `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the optimizer's state tensors; shared ones are counted once."""
    tensors = {
        id(value): value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    }
    return sum(each.numel() * each.element_size() for each in tensors.values())


ABSENT = {
    "lomo": "its library is not kept, and what it does is sgd with layerwise: true",
    "adalomo": "its library is not kept, and what it does is nearly adafactor with layerwise: true",
}
"""Optimizers of other libraries that are not here, and what to use instead."""

if TYPE_CHECKING:

    class OptimizerConfig(OptimizerSettings):
        """Settings of any optimizer."""

        type: str
else:
    OptimizerConfig = choice_of(
        __name__, default="adamw", absent=ABSENT, page="docs/add-an-optimizer.md", base=OptimizerSettings
    )
