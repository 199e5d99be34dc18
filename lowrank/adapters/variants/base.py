"""What a variant is: its hooks, and the optional ones that it may have beside them.

A variant sees the base only as a `BaseLinear`, so every variant works on every storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from lowrank.adapters.calibration import CalibrationSteps
from lowrank.models.storages import BaseLinear

Tensors = Mapping[str, torch.Tensor]
"""Tensors of one adapter at one layer, by PEFT's name: `lora_A` (R, D), `lora_B` (O, R), ..."""


@dataclass(frozen=True)
class AdapterSite:
    """Where an adapter is about to be attached."""

    layers: Mapping[str, BaseLinear]
    """Every linear layer it reaches, by full name."""
    original: Callable[[str], torch.Tensor]
    """The weight (O, D) of a layer as the checkpoint has it, before quantization; ModelError if it cannot be read."""
    device: torch.device
    dtype: torch.dtype
    """Of masters: float32 or wider."""
    ranks: Mapping[str, int]
    """Of every layer, by the settings."""
    calibration: CalibrationSteps | None = None
    """The job's own data, for settings with `needs_calibration`; None where there is none (a memory plan)."""


class Variant:
    """One kind of update of a linear layer; an object serves one adapter at all its layers.

    This is all that a variant has to say: its formula as a low-rank pair (`as_low_rank`), which rides the routed
    linear, or by `apply` and `merge`. What only some methods need they get by inheriting one of the protocols below as
    well; the bank asks for those by `isinstance`.
    """

    frozen: frozenset[str] = frozenset()
    """Tensors of `init` that are not trained."""

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of the update: alpha / rank, or what the variant makes of them."""
        return alpha / rank

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Fresh float32 tensors; the layer must compute what the base computes."""
        raise NotImplementedError

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`(A_RD, B_OR)` if y += scale * (x A^T) B^T says it all: rides the routed linear. None: `apply` is called."""
        del tensors
        return None

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


class SiteSetup:
    """Of variants that look at all their layers, or at the job's data, before the first `init`."""

    def setup(self, site: AdapterSite, rank: int) -> None:
        """Called once. `rank` is the adapter's general one."""

    def layer_rank(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Rank and alpha of the layer of this name, where `setup` found better ones than the settings say. Rank 0: the
        layer gets no adapter."""
        del name
        return rank, alpha


class OutputGain:
    """Of variants that multiply every output by a gain after the low-rank update, the bias left out (DoRA).

    The routed linear applies the gain where nothing is dropped. Under dropout, which reaches the base's part of the
    change too, it calls the variant's `apply`.
    """

    def output_gain(self, tensors: Tensors) -> torch.Tensor:
        """g - 1 (O)."""
        raise NotImplementedError


class BiasMerge:
    """Of variants that change the bias as well ((IA)^3)."""

    def merge_bias(self, bias_O: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """The bias that goes with `merge`."""
        raise NotImplementedError


class TrainingHooks:
    """Of variants that do something between optimizer steps."""

    def refresh(self, base: BaseLinear, scale: float, tensors: Tensors) -> None:
        """Bring frozen tensors that follow from trained ones up to date: after each update and load."""

    def penalty(self, layers: Mapping[str, Tensors]) -> torch.Tensor | None:
        """What is added to the loss of each optimizer step, whatever its data; `layers`: all its tensors, by layer."""
        del layers
        return None

    def after_update(self, layers: Mapping[str, Tensors], step: int, num_steps: int) -> None:
        """Called after optimizer step `step` (1 is the first) of `num_steps`, with the gradients still there."""

    def state(self) -> Tensors:
        """What of `after_update` a run that goes on has to know; `load_state` takes it back."""
        return {}

    def load_state(self, tensors: Tensors) -> None:
        """Take back what `state` gave."""


class FileForm:
    """Of variants whose files hold other tensors than they train."""

    files_hold_all: bool = True
    """Whether `saved` is all that training needs to go on; if not, checkpoints keep the trained tensors besides, and
    `TrainingHooks.state`."""

    def saved(self, tensors: Tensors) -> Tensors:
        """What stands in the file: as PEFT has it, under the settings that `as_saved` gives."""
        raise NotImplementedError

    def restored(self, saved: Tensors, tensors: Tensors) -> Tensors:
        """The inverse of `saved`, for a fresh adapter's `tensors`; those left out stay as they are."""
        del tensors
        return saved

    def target_in_files(self, scale: float, saved: Tensors) -> tuple[int, float] | None:
        """Rank and alpha of a layer in files, where they follow from its tensors; None: from the settings."""
        del scale, saved
        return None


class SharedTensors:
    """Of variants whose layers hold views of the same frozen tensors (VeRA)."""

    shared: Mapping[str, torch.Tensor] = MappingProxyType({})
    """Those tensors, by their names in files. No copies of A and B are kept in the compute dtype then."""
    saves_shared: bool = False
    """They came from a file with other values than are drawn here, so files of it have to hold them."""

    def shared_tensors(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Tensors]:
        """By layer, what `merge` needs and the layer's own tensors in a file do not hold. `shapes`: (O, D) of every
        layer; `rank`: the adapter's general one; `tensors`: all of the file's."""
        raise NotImplementedError


def saved_tensors(variant: Variant, tensors: Tensors) -> Tensors:
    """What of a layer's tensors stands in files: those that are trained, or what the variant's `FileForm` gives."""
    if isinstance(variant, FileForm):
        return variant.saved(tensors)
    return {key: tensor for key, tensor in tensors.items() if key not in variant.frozen}


def low_rank_of(variant: Variant, tensors: Tensors, *, dropped: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(A, B) where the routed linear may take the variant as a low-rank pair, `dropped`: under dropout."""
    return None if dropped and isinstance(variant, OutputGain) else variant.as_low_rank(tensors)


def gain_of(variant: Variant, tensors: Tensors) -> torch.Tensor | None:
    """g - 1 (O) of a variant that has a gain."""
    return variant.output_gain(tensors) if isinstance(variant, OutputGain) else None


def reads_all_from_files(variant: Variant) -> bool:
    """Whether training goes on from an adapter's files alone."""
    return not isinstance(variant, FileForm) or variant.files_hold_all
