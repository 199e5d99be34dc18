"""What an adapter adds to a frozen linear layer: one file each.

A variant file has a `Config` (an `AdapterSettings` with `type`) whose `build()` returns a `Variant`.
A variant sees the base only as a `BaseLinear`, so every variant works on every storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.look import Looks
from lowrank.models.storages import BaseLinear
from lowrank.settings import choice_of

Tensors = Mapping[str, torch.Tensor]
"""Tensors of one adapter at one layer, by PEFT's name: `lora_A` (R, D), `lora_B` (O, R), ..."""

IN_MODULES = ("lora_A", "lora_B", "oft_R")
"""Tensors that PEFT keeps in modules of their own, so that their names in files end in `.weight`."""


def name_in_files(key: str) -> str:
    """The end of a tensor's name in adapter_model.safetensors."""
    return f"{key}.weight" if key in IN_MODULES else key


@dataclass(frozen=True)
class Site:
    """Where an adapter is about to be attached."""

    layers: Mapping[str, BaseLinear]
    """Every linear layer it reaches, by full name."""
    original: Callable[[str], torch.Tensor]
    """The weight (O, D) of a layer as the checkpoint has it, before quantisation; ModelError if it cannot be read."""
    device: torch.device
    dtype: torch.dtype
    """Of masters: float32 or wider."""
    ranks: Mapping[str, int]
    """Of every layer, by the settings."""
    looks: Looks | None = None
    """The job's own data, for variants whose `Config.looks_at_data`; None where there is none (a memory plan)."""


class Variant:
    """One kind of update of a linear layer; an object serves one adapter at all its layers.

    A subclass says its formula in `as_low_rank` (rides the routed linear, `gain` may add a factor) or in `apply`.
    """

    frozen: frozenset[str] = frozenset()
    """Tensors of `init` that are not trained."""
    keeps_copies: bool = True
    """Whether A and B are kept in the compute dtype, or cast in every pass (where copies would cost memory)."""
    files_hold_all: bool = True
    """Whether `saved` is all that training needs to go on; if not, checkpoints keep the tensors and `state` besides."""
    reaches_heads: bool = False
    """Whether it may sit on the output head, embeddings and fused experts: a plain pair A, B that starts as LoRA's."""

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the update: alpha / rank, or what the variant makes of them."""
        return alpha / rank

    def begin(self, site: Site, rank: int) -> None:
        """Called once, before the first `init`. `rank` is the adapter's general one."""

    def settled(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the layer of this name, where `begin` found better ones than the settings say. Rank 0: the
        layer gets no adapter."""
        del name
        return rank, alpha

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Fresh float32 tensors; the layer must compute what the base computes."""
        raise NotImplementedError

    def drawn(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Tensors]:
        """By layer, what `merge` needs and the layer's own tensors in a file do not hold. `shapes`: (O, D) of every
        layer; `rank`: the adapter's general one; `tensors`: all of the file's."""
        del shapes, rank, tensors
        return {}

    def refresh(self, base: BaseLinear, scale: float, tensors: Tensors) -> None:
        """Bring frozen tensors that follow from trained ones up to date: after each update and load."""

    def penalty(self, layers: Mapping[str, Tensors]) -> torch.Tensor | None:
        """What is added to the loss of each optimiser step, whatever its data; `layers`: all its tensors, by layer."""
        del layers
        return None

    def after_update(self, layers: Mapping[str, Tensors], step: int, num_steps: int) -> None:
        """Called after optimiser step `step` (1 is the first) of `num_steps`, with the gradients still there."""

    def state(self) -> Tensors:
        """What of `after_update` a run that goes on has to know; `load_state` takes it back."""
        return {}

    def load_state(self, tensors: Tensors) -> None:
        """Take back what `state` gave."""

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(A_RD, B_OR)` if y += scale * (x A^T) B^T says it all: rides the routed linear. None: `apply` is called."""
        del tensors
        return None

    def excess_gain(self, tensors: Tensors) -> torch.Tensor | None:
        """g - 1 (O) where every output is multiplied by a gain g after the low-rank update, the bias left out."""
        del tensors
        return None

    def rides(self, dropped: bool) -> bool:
        """Whether the low-rank form holds under dropout of the adapter's input too."""
        del dropped
        return True

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """(dropped-out input, base output) -> output, with autograd. `base.dense_weight()` may be scratch memory: let
        `frozen_product` multiply with it."""
        low_rank = self.as_low_rank(tensors)
        assert low_rank is not None, f"{type(self).__name__} has neither apply nor as_low_rank"
        A_RD, B_OR = (tensor.to(x_TD.dtype) for tensor in low_rank)
        return y_TO + scale * (x_TD @ A_RD.t()) @ B_OR.t()

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """The weight of a plain linear that computes the same, in the wider of the weight's dtype and the adapter's."""
        low_rank = self.as_low_rank(tensors)
        assert low_rank is not None, f"{type(self).__name__} has neither merge nor as_low_rank"
        A_RD, B_OR = low_rank
        wide = torch.promote_types(weight_OD.dtype, A_RD.dtype)
        merged_OD = weight_OD.to(wide)
        if merged_OD is weight_OD:
            return torch.addmm(weight_OD, B_OR.to(wide), A_RD.to(wide), alpha=scale)
        return merged_OD.addmm_(B_OR.to(wide), A_RD.to(wide), alpha=scale)  # in place: half of the time

    def merge_bias(self, bias_O: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """The bias that goes with `merge`."""
        del tensors
        return bias_O

    def saved(self, tensors: Tensors) -> Tensors:
        """What stands in the file: as PEFT has it, under the settings `Config.as_saved` gives."""
        return {key: tensor for key, tensor in tensors.items() if key not in self.frozen}

    def target_in_files(self, scale: float, saved: Tensors) -> tuple[int, float] | None:
        """Rank and alpha of a layer in files, where they follow from its tensors; None: from the settings."""
        del scale, saved
        return None

    def restored(self, saved: Tensors, tensors: Tensors) -> Tensors:
        """The inverse of `saved`, for a fresh adapter's `tensors`; those left out stay as they are."""
        del tensors
        return saved


ABSENT = {
    "bottleneck": "it inserts layers of its own into the model, which cannot be merged; use lora",
}
"""Methods that people know from PEFT and elsewhere, and what to use."""

if TYPE_CHECKING:

    class AdapterConfig(AdapterSettings):
        """What every variant's `Config` offers."""

        type: str

        def build(self) -> Variant: ...
else:
    AdapterConfig = choice_of(__name__, default="lora", absent=ABSENT)
