"""LoftQ: LoRA that starts by making up for what quantization lost (arXiv:2310.08659).

A and B are the best rank-R approximation of (W - Q) / s, W the checkpoint's weight and Q the stored one. The paper
also moves Q in turns; here Q is shared by all adapters and stays, as in PEFT's `replace_lora_weights_loftq`, so any
storage and number of bits will do. What is saved is a plain LoRA for the quantized base.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import AdapterSite, SiteSetup, Tensors
from lowrank.adapters.variants.lora import Lora, LoraConfig
from lowrank.adapters.variants.pissa import largest_singular
from lowrank.models.storages import BaseLinear
from lowrank.settings import NonNegative


class LoftQConfig(AdapterSettings):
    """LoRA-fine-tuning-aware quantization: the start reduces the quantization error. Saved as plain LoRA."""

    paper: ClassVar[str] = "arXiv:2310.08659"
    when: ClassVar[str] = "bases of 4 bits and less"
    needs_quantized: ClassVar[bool] = True
    type: Literal["loftq"] = "loftq"
    niter: NonNegative = 16
    """Power iterations of the fast randomized SVD; 0: the exact SVD, minutes per large layer."""

    def build(self) -> LoftQ:
        """A `LoftQ` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return LoftQ(self.niter)

    def as_saved(self) -> AdapterSettings:
        """Plain LoRA."""
        return LoraConfig(**self.shared())


class LoftQ(Lora, SiteSetup):
    """LoRA but for its start: the layer computes what the unquantized base computes, as nearly as rank R allows."""

    def __init__(self, niter: int) -> None:
        self.niter = niter
        self.site: AdapterSite | None = None
        self.name_of: dict[int, str] = {}

    def setup(self, site: AdapterSite, rank: int) -> None:
        """Keep the way to the original weights."""
        del rank
        self.site = site
        self.name_of = {id(layer): name for name, layer in site.layers.items()}

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """scale * B A approximates W - Q."""
        if self.site is None:  # a layer by itself, with nothing to make up for
            return super().init(base, rank, scale, generator)
        stored_OD = base.dense_weight().detach().float().clone()
        error_OD = self.site.original(self.name_of[id(base)]).to(stored_OD) - stored_OD
        left_OR, values_R, right_DR = largest_singular(error_OD, rank, self.niter, generator)
        root_R = (values_R / scale).sqrt()
        return {"lora_A": (root_R[:, None] * right_DR.t()).contiguous(), "lora_B": (left_OR * root_R).contiguous()}
