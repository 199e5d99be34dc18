"""DoRA: LoRA for the direction of each weight row, and a trained magnitude (arXiv:2402.09353).

y = m / |W + s B A| * (W + s B A) x + b, |.| the norm of each row, held constant in the gradient (section 4.3; PEFT
does the same). The norm follows from |W|^2, W A^T and A A^T, once per update, so no (O, D) matrix is built:

    |W + s B A|^2 = |W|^2 + 2 s sum_R (W A^T) B + s^2 sum_R (B A A^T) B
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor, lora_with
from lowrank.adapters.variants.base import OutputGain, Tensors, TrainingHooks, Variant
from lowrank.adapters.variants.lora import Lora
from lowrank.models.storages import BaseLinear, bias_of
from lowrank.models.storages.packed import frozen_product

_ROWS = 512
"""Rows of a 16-bit weight that are widened at a time."""


class DoraConfig(AdapterSettings):
    """Weight-decomposed low-rank adaptation. Dropout costs a second pass through the base layer, as in PEFT."""

    paper: ClassVar[str] = "arXiv:2402.09353"
    when: ClassVar[str] = "closer to full tuning at low ranks"
    peft: ClassVar[PeftKind] = lora_with(PeftTensor("lora_magnitude_vector", ("O",), because="use_dora"))
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"use_dora": True}
    type: Literal["dora"] = "dora"

    def build(self) -> Variant:
        """A `Dora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Dora()


class Dora(Lora, OutputGain, TrainingHooks):
    """LoRA, and `lora_magnitude_vector` (O). `weight_norm` and `base_norm` (O) follow from the others."""

    frozen = frozenset({"weight_norm", "base_norm"})

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """The magnitude is the norm, so the gain is 1."""
        tensors = super().init(base, rank, scale, generator)
        norm_O = torch.cat([rows.norm(dim=1) for rows in _wide_rows(base, torch.float32)])
        norms = {"weight_norm": norm_O.clone(), "base_norm": norm_O.clone()}
        return {**tensors, "lora_magnitude_vector": norm_O, **norms}

    @torch.no_grad()
    def refresh(self, base: BaseLinear, scale: float, tensors: Tensors) -> None:
        """Bring the norm up to date; while B is zero it is the base's, to the bit."""
        A_RD, B_OR, base_O = tensors["lora_A"], tensors["lora_B"], tensors["base_norm"]
        cross_OR = torch.cat([rows @ A_RD.t() for rows in _wide_rows(base, A_RD.dtype)])
        change_O = ((2 * scale * cross_OR + scale**2 * (B_OR @ (A_RD @ A_RD.t()))) * B_OR).sum(1)
        norm_O = (base_O.square() + change_O).clamp_min(0).sqrt()
        tensors["weight_norm"].copy_(torch.where(change_O == 0, base_O, norm_O))

    def output_gain(self, tensors: Tensors) -> torch.Tensor:
        """m / |W + s B A| - 1."""
        return tensors["lora_magnitude_vector"] / tensors["weight_norm"] - 1

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """y + (g - 1) W x + g s B A x, x dropped out."""
        excess_O = self.output_gain(tensors).to(x_TD.dtype)
        A_RD, B_OR = (tensor.to(x_TD.dtype) for tensor in self.as_low_rank(tensors))
        plain_TO, bias_O = frozen_product(x_TD, base), bias_of(base)
        if bias_O is not None:
            plain_TO = plain_TO - bias_O
        return y_TO + excess_O * plain_TO + (1 + excess_O) * scale * ((x_TD @ A_RD.t()) @ B_OR.t())

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """g (W + s B A). The norm is taken of the merged weight, since files of adapters do not hold it."""
        wide = torch.promote_types(weight_OD.dtype, tensors["lora_A"].dtype)
        merged_OD = super().merge(weight_OD.to(wide), scale, tensors)
        gain_O1 = tensors["lora_magnitude_vector"].to(wide)[:, None] / merged_OD.norm(dim=1, keepdim=True)
        return gain_O1 * merged_OD


def _wide_rows(base: BaseLinear, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The base's weight in chunks of rows, in the wider of `dtype` and its own."""
    weight_OD = base.dense_weight().detach()
    wide = torch.promote_types(weight_OD.dtype, dtype)
    for rows in weight_OD.split(_ROWS):
        yield rows.to(wide)
