"""OLoRA: LoRA that starts from orthonormal directions, the QR decomposition of the weight (arXiv:2406.01775).

As with PiSSA the shared base stays as it is, and files hold a LoRA of rank 2R; see pissa.py.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import Variant
from lowrank.adapters.variants.pissa import Shifted, as_doubled


class OLoraConfig(AdapterSettings):
    """Orthonormal LoRA; saved as LoRA of twice the rank."""

    paper: ClassVar[str] = "arXiv:2406.01775"
    when: ClassVar[str] = "like pissa, with a quicker start-up"
    type: Literal["olora"] = "olora"

    def build(self) -> Variant:
        """An `Olora` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Olora()

    def as_saved(self) -> AdapterSettings:
        """LoRA of rank 2R and the same scale."""
        return as_doubled(self)


class Olora(Shifted):
    """B0 (O, R): the first R columns of Q; A0 (R, D): the first R rows of R. The scale is left out, as in PEFT."""

    def start(
        self, weight_OD: torch.Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From W = Q R."""
        del scale, generator
        if rank > min(weight_OD.shape):
            raise ValueError(f"rank {rank} is more than a layer of {tuple(weight_OD.shape)} has directions")
        Q, R = torch.linalg.qr(weight_OD)
        return R[:rank], Q[:, :rank]
