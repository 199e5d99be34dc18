"""MiSS: the inputs are summed in R groups, and one trained matrix maps the sums to the outputs (arXiv:2409.15371).

y += B A x, where A (R, D) is fixed: input i belongs to group i mod R. Formerly Bone. Only B is trained, so no layer's
input needs to be kept for the backward pass where nothing else keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear
from lowrank.settings import Positive


class MissConfig(AdapterSettings):
    """Matrix shard sharing: half of LoRA's parameters at the same rank."""

    paper: ClassVar[str] = "arXiv:2409.15371"
    when: ClassVar[str] = "when activations do not fit; high ranks at little cost"
    peft: ClassVar[PeftKind] = PeftKind(
        "MISS",
        tensors=((PeftTensor("miss_block", ("R", "O")),),),
        names={"rank": "r", "dropout": "miss_dropout"},
        ignored=frozenset({"init_weights", "mini_r"}),
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"init_weights": True}
    refused: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "PEFT's MiSS has one rank for all layers; use adapter.rank",
        "alpha_pattern": "MiSS has no alpha",
    }
    unused: ClassVar[tuple[str, ...]] = ("alpha",)
    type: Literal["miss"] = "miss"
    rank: Positive = 64
    """Groups of inputs, PEFT's `r`."""

    def build(self) -> Variant:
        """A `Miss` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Miss()


class Miss(Variant):
    """`miss_block` (R, O) starts at zero; `groups` (R, D) has a 1 where an input belongs to a group."""

    frozen = frozenset({"groups"})

    def scale(self, rank: int, alpha: float) -> float:
        """1."""
        del rank, alpha
        return 1.0

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start. ValueError for more groups than inputs."""
        del scale, generator
        if rank > base.in_features:
            raise ValueError(f"rank {rank} is more than its {base.in_features} inputs")
        group_D = torch.arange(base.in_features) % rank
        groups_RD = (group_D[None] == torch.arange(rank)[:, None]).float()
        return {"miss_block": torch.zeros(rank, base.out_features), "groups": groups_RD}

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(the groups, the block)."""
        return tensors["groups"], tensors["miss_block"].t()

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """The groups follow from the shapes, so files need not hold them."""
        block_RO = tensors["miss_block"]
        group_D = torch.arange(weight_OD.shape[1], device=weight_OD.device) % len(block_RO)
        wide = torch.promote_types(weight_OD.dtype, block_RO.dtype)
        return weight_OD.to(wide) + scale * block_RO.t().to(wide)[:, group_D]
