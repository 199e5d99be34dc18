"""HRA: the input is reflected at R trained hyperplanes before it meets the weight (arXiv:2405.17484).

y = W H_1 H_2 ... H_R x + b, where H_i = I - 2 v_i v_i^T and v_i is a column of `hra_u`, made a unit vector. The product
of the reflections is I - V T V^T with T (R, R) upper triangular, so nothing of size D x D is made, and of the base only
W V is needed: R more rows for it, instead of its whole input again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from typing_extensions import Self

from lowrank.adapters.config import AdapterSettings, Rank
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear, bias_of
from lowrank.models.storages.packed import frozen_product

ODD = "an odd number of reflections turns the space inside out, so it cannot start as the base; use an even rank"


class HRAConfig(AdapterSettings):
    """Householder reflection adaptation: orthogonal like OFT, at the cost of a low-rank update."""

    paper: ClassVar[str] = "arXiv:2405.17484"
    when: ClassVar[str] = "keeping what the base knows, at half of LoRA's parameters"
    peft: ClassVar[PeftKind] = PeftKind(
        "HRA",
        tensors=((PeftTensor("hra_u", ("D", "R")),),),
        names={"rank": "r"},
        ignored=frozenset({"init_weights"}),
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"apply_GS": False, "init_weights": True}
    refused: ClassVar[Mapping[str, str]] = {
        "dropout": "HRA reflects the input, so there is nothing to drop; set it to 0",
        "rank_pattern": "PEFT's HRA has one rank for all layers; use adapter.rank",
        "alpha_pattern": "HRA has no alpha",
    }
    unused: ClassVar[tuple[str, ...]] = ("alpha",)
    type: Literal["hra"] = "hra"
    rank: Rank = 8
    """Reflections, PEFT's `r`; an even number."""

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.rank % 2:
            raise ValueError(f"rank {self.rank}: {ODD}")
        return self

    def build(self) -> Variant:
        """A `Hra` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Hra()


class Hra(Variant):
    """`hra_u` (D, R) starts as pairs of equal columns: a reflection, and the same again, which takes it back."""

    def scale(self, rank: int, alpha: float) -> float:
        """1."""
        del rank, alpha
        return 1.0

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """PEFT's: Kaiming-uniform columns, each twice."""
        del scale
        bound = 1 / math.sqrt(rank // 2)
        half_DH = torch.empty(base.in_features, rank // 2).uniform_(-bound, bound, generator=generator)
        return {"hra_u": half_DH.repeat_interleave(2, dim=1)}

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """y - W V T V^T x."""
        del scale
        unit_DR, mixing_RR = _reflections(tensors["hra_u"])
        unit_DR = unit_DR.to(x_TD.dtype)
        product_RO, bias_O = frozen_product(unit_DR.t(), base), bias_of(base)
        if bias_O is not None:
            product_RO = product_RO - bias_O
        mixed_RO = mixing_RR.t() @ product_RO.to(mixing_RR.dtype)
        return y_TO - (x_TD @ unit_DR) @ mixed_RO.to(x_TD.dtype)

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W - W V T V^T."""
        del scale
        unit_DR, mixing_RR = _reflections(tensors["hra_u"])
        wide = torch.promote_types(weight_OD.dtype, unit_DR.dtype)
        unit_DR = unit_DR.to(wide)
        return weight_OD.to(wide) - weight_OD.to(wide) @ unit_DR @ mixing_RR.to(wide) @ unit_DR.t()


def _reflections(u_DR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(V, T): the unit vectors (D, R), and T (R, R) such that H_1 ... H_R = I - V T V^T.

    T is the inverse of I / 2 + the part of V^T V above the diagonal (the compact WY form of Householder products).
    """
    unit_DR = u_DR / u_DR.norm(dim=0)
    identity_RR = torch.eye(unit_DR.shape[1], dtype=unit_DR.dtype, device=unit_DR.device)
    upper_RR = identity_RR / 2 + (unit_DR.t() @ unit_DR).triu(1)
    return unit_DR, torch.linalg.solve_triangular(upper_RR, identity_RR, upper=True)
