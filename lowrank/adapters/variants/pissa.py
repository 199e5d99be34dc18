"""PiSSA: LoRA that starts from the principal singular directions of the weight (arXiv:2404.02948).

The method replaces W by W - s B0 A0 and trains A, B from A0, B0. Here the base is shared and stays as it is; the
layer computes the same as

    y = W x + s (B A - B0 A0) x = W x + s ((B - B0) A + B0 (A - A0)) x,

a low-rank update of rank 2R, whose differences are taken in float32 before anything is cast. It is exactly zero at the
start. Dropout drops this change, not the principal part of the weight as in PEFT.

In files it is a LoRA of rank 2R, [A; A0] and [B, -B0]: what PEFT's own conversion gives
(`save_pretrained(..., path_initial_model_for_weight_conversion=...)`). A0 and B0 are read back from there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import FileForm, Tensors, Variant
from lowrank.adapters.variants.lora import LoraConfig
from lowrank.models.storages import BaseLinear
from lowrank.settings import NonNegative


class PissaConfig(AdapterSettings):
    """Principal singular values and vectors adaptation; saved as LoRA of twice the rank."""

    paper: ClassVar[str] = "arXiv:2404.02948"
    when: ClassVar[str] = "faster start than LoRA at the same rank"
    type: Literal["pissa"] = "pissa"
    niter: NonNegative = 16
    """Power iterations of the fast randomized SVD (PEFT's pissa_niter_16); 0: exact, minutes per large layer."""

    def build(self) -> Variant:
        """A `Pissa` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Pissa(self.niter)

    def as_saved(self) -> AdapterSettings:
        """LoRA of rank 2R and the same scale."""
        return as_doubled(self)


def as_doubled(config: AdapterSettings) -> AdapterSettings:
    """The settings of a LoRA of twice the rank with the same scale everywhere."""
    shared = config.shared()
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    shared |= {
        "rank": 2 * config.rank,
        "alpha": 2 * alpha,
        "rank_pattern": {name: 2 * rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {name: 2 * alpha for name, alpha in config.alpha_pattern.items()},
    }
    return LoraConfig(**shared)


class Shifted(Variant, FileForm):
    """A and B trained from A0, B0, whose product is taken off again. A subclass gives the start."""

    frozen = frozenset({"start_A", "start_B"})

    def start(
        self, weight_OD: torch.Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(A0 (R, D), B0 (O, R)) from the float32 weight."""
        raise NotImplementedError

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """The change is zero."""
        started = self.start(base.dense_weight().detach().float(), rank, scale, generator)
        A_RD, B_OR = (factor.contiguous() for factor in started)
        return {"lora_A": A_RD, "lora_B": B_OR, "start_A": A_RD.clone(), "start_B": B_OR.clone()}

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """([A; A - A0], [B - B0, B0])."""
        A_RD, B_OR, start_RD, start_OR = (tensors[key] for key in ("lora_A", "lora_B", "start_A", "start_B"))
        return torch.cat([A_RD, A_RD - start_RD]), torch.cat([B_OR - start_OR, start_OR], dim=1)

    def saved(self, tensors: Tensors) -> Tensors:
        """([A; A0], [B, -B0])."""
        return {
            "lora_A": torch.cat([tensors["lora_A"], tensors["start_A"]]),
            "lora_B": torch.cat([tensors["lora_B"], -tensors["start_B"]], dim=1),
        }

    def restored(self, saved: Tensors, tensors: Tensors) -> Tensors:
        """All four, from the two."""
        (A_RD, start_RD), (B_OR, start_OR) = saved["lora_A"].chunk(2), saved["lora_B"].chunk(2, dim=1)
        return {"lora_A": A_RD, "lora_B": B_OR, "start_A": start_RD, "start_B": -start_OR}


class Pissa(Shifted):
    """A0 = sqrt(S/s) U^T, B0 = V sqrt(S/s) of the R largest singular values."""

    def __init__(self, niter: int) -> None:
        self.niter = niter

    def start(
        self, weight_OD: torch.Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact, or by power iterations from directions drawn from `generator`."""
        left_OR, values_R, right_DR = largest_singular(weight_OD, rank, self.niter, generator)
        root_R = (values_R / scale).sqrt()
        return root_R[:, None] * right_DR.t(), left_OR * root_R


def largest_singular(
    matrix_OD: torch.Tensor, rank: int, niter: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left (O, R), values (R), right (D, R)) of the `rank` largest singular values.

    `niter` 0: exact; else that many subspace iterations (arXiv:0909.4061, algorithm 5.1, as torch.svd_lowrank, whose
    random numbers are global). Raises ValueError if the matrix has fewer.
    """
    if rank > min(matrix_OD.shape):
        raise ValueError(f"rank {rank} is more than a layer of {tuple(matrix_OD.shape)} has singular values")
    if not niter:
        left, values, right = torch.linalg.svd(matrix_OD, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank].t()
    width = min(rank + 8, *matrix_OD.shape)  # a few more, for accuracy
    drawn = torch.randn(matrix_OD.shape[1], width, generator=generator).to(matrix_OD)
    basis = torch.linalg.qr(matrix_OD @ drawn).Q
    for _ in range(niter):
        basis = torch.linalg.qr(matrix_OD @ torch.linalg.qr(matrix_OD.t() @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix_OD, full_matrices=False)
    return (basis @ left)[:, :rank], values[:rank], right[:rank].t()
