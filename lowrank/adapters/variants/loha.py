"""LoHa: the elementwise product of two low-rank matrices, of rank up to R^2 (FedPara, arXiv:2108.06098).

y += s ((B1 A1) * (B2 A2)) x. The product is built as an (O, D) matrix in every pass, as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear

NO_INPUT_DROPOUT: Mapping[str, str] = {
    "dropout": "PEFT's form of this method has no dropout of the input; set it to 0",
}


class LoHaConfig(AdapterSettings):
    """Low-rank Hadamard product."""

    paper: ClassVar[str] = "arXiv:2108.06098"
    when: ClassVar[str] = "high-rank updates from few parameters"
    peft: ClassVar[PeftKind] = PeftKind(
        "LOHA",
        tensors=(
            (
                *(PeftTensor(f"hada_w{half}_a", ("O", "R")) for half in (1, 2)),
                *(PeftTensor(f"hada_w{half}_b", ("R", "D")) for half in (1, 2)),
            ),
        ),
        names={"rank": "r", "alpha": "alpha"},
        ignored=frozenset({"rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d"}),
        has_patterns=True,
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
    refused: ClassVar[Mapping[str, str]] = NO_INPUT_DROPOUT
    type: Literal["loha"] = "loha"

    def build(self) -> Variant:
        """A `Loha` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Loha()


class Delta(Variant):
    """An update whose matrix (O, D) a subclass computes."""

    def delta(self, tensors: Tensors) -> torch.Tensor:
        """The update without its scale."""
        raise NotImplementedError

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """y + s Delta x."""
        del base
        return y_TO + scale * (x_TD @ self.delta(tensors).to(x_TD.dtype).t())

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W + s Delta."""
        delta_OD = self.delta(tensors)
        wide = torch.promote_types(weight_OD.dtype, delta_OD.dtype)
        return weight_OD.to(wide) + scale * delta_OD.to(wide)


class Loha(Delta):
    """`hada_w1_a`, `hada_w2_a` (O, R), `hada_w1_b`, `hada_w2_b` (R, D); the last starts at zero, the others
    Kaiming-uniform."""

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since one factor is zero."""
        del scale
        shapes = {"a": (base.out_features, rank), "b": (rank, base.in_features)}
        tensors = {f"hada_w{half}_{side}": torch.zeros(shapes[side]) for half in (1, 2) for side in ("a", "b")}
        for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a"):
            torch.nn.init.kaiming_uniform_(tensors[key], a=math.sqrt(5), generator=generator)
        return tensors

    def delta(self, tensors: Tensors) -> torch.Tensor:
        """(w1_a w1_b) * (w2_a w2_b)."""
        return (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
