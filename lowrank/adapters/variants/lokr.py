"""LoKr: the Kronecker product of a small and a (low-rank) larger matrix (LyCORIS, arXiv:2309.14859).

y += s (W1 (x) W2) x, W1 (l, m), W2 (k, n), O = l k, D = m n. The product is never built: x as (T, m, n) meets W2,
then W1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.adapters.variants.loha import NO_INPUT_DROPOUT
from lowrank.models.storages import BaseLinear


class LoKrConfig(AdapterSettings):
    """Low-rank Kronecker product."""

    paper: ClassVar[str] = "arXiv:2309.14859"
    when: ClassVar[str] = "full-rank updates from few parameters"
    peft: ClassVar[PeftKind] = PeftKind(
        "LOKR",
        tensors=(
            (PeftTensor("lokr_w1", ("l", "m")),),
            (PeftTensor("lokr_w1_a", ("l", "R")), PeftTensor("lokr_w1_b", ("R", "m"))),
            (PeftTensor("lokr_w2", ("k", "n")),),
            (PeftTensor("lokr_w2_a", ("k", "R")), PeftTensor("lokr_w2_b", ("R", "n"))),
        ),
        names={
            "rank": "r",
            "alpha": "alpha",
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
        },
        ignored=frozenset(
            {"rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights", "use_effective_conv2d"}
        ),
        has_patterns=True,
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True}
    refused: ClassVar[Mapping[str, str]] = NO_INPUT_DROPOUT
    type: Literal["lokr"] = "lokr"
    decompose_both: bool = False
    """Make W1 low-rank too, where that saves anything."""
    decompose_factor: int = -1
    """Rows of W1 are the largest divisor up to this; -1: near the square root of the width."""

    @field_validator("decompose_factor")
    @classmethod
    def _a_factor(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("expected -1 or a number above 0")
        return value

    def build(self) -> Variant:
        """A `Lokr` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Lokr(self.decompose_both, self.decompose_factor)


class Lokr(Variant):
    """`lokr_w1` (l, m) starts at zero; `lokr_w2` (k, n), or `lokr_w2_a` (k, R) and `lokr_w2_b` (R, n),
    Kaiming-uniform."""

    def __init__(self, decompose_both: bool, factor: int) -> None:
        self.decompose_both = decompose_both
        self.factor = factor

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since W1 is zero. Which matrices are factored: PEFT's rule."""
        del scale
        (left, k), (m, n) = factors(base.out_features, self.factor), factors(base.in_features, self.factor)
        tensors: dict[str, torch.Tensor] = {}
        if self.decompose_both and rank < max(left, m) / 2:
            tensors |= {"lokr_w1_a": torch.zeros(left, rank), "lokr_w1_b": torch.empty(rank, m)}
        else:
            tensors["lokr_w1"] = torch.zeros(left, m)
        if rank < max(k, n) / 2:
            tensors |= {"lokr_w2_a": torch.empty(k, rank), "lokr_w2_b": torch.empty(rank, n)}
        else:
            tensors["lokr_w2"] = torch.empty(k, n)
        for key, tensor in tensors.items():
            if key not in ("lokr_w1", "lokr_w1_a"):
                torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
        return tensors

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """y + s (W1 (x) W2) x."""
        del base
        w1, w2 = (matrix.to(x_TD.dtype) for matrix in _halves(tensors))
        half_Tmk = x_TD.reshape(len(x_TD), w1.shape[1], w2.shape[1]) @ w2.t()
        return y_TO + scale * (w1 @ half_Tmk).reshape(y_TO.shape)

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W + s W1 (x) W2."""
        w1, w2 = _halves(tensors)
        wide = torch.promote_types(weight_OD.dtype, w1.dtype)
        return weight_OD.to(wide) + scale * torch.kron(w1.contiguous(), w2.contiguous()).to(wide)


def _halves(tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    w1, w2 = (
        tensors[key] if key in tensors else tensors[f"{key}_a"] @ tensors[f"{key}_b"] for key in ("lokr_w1", "lokr_w2")
    )
    return w1, w2


def factors(width: int, factor: int) -> tuple[int, int]:
    """(m, n), m n = width, m <= n unless `factor` divides `width`: as PEFT factorises."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    limit = width if factor == -1 else factor
    best = (1, width)
    for m in range(2, width + 1):
        if best[0] >= best[1]:
            break
        if width % m:
            continue
        if m + width // m > sum(best) or m > limit:
            break
        best = (m, width // m)
    return (best[0], best[1]) if best[0] <= best[1] else (best[1], best[0])
