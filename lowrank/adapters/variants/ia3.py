"""(IA)^3: a trained factor for every output, or in feed-forward layers for every input (arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.targets import matches
from lowrank.adapters.variants.base import AdapterSite, BiasMerge, SiteSetup, Tensors, Variant
from lowrank.models.storages import BaseLinear
from lowrank.models.storages.packed import frozen_product


class IA3Config(AdapterSettings):
    """Infused adapter by inhibiting and amplifying inner activations. It has no rank, alpha or dropout."""

    paper: ClassVar[str] = "arXiv:2205.05638"
    when: ClassVar[str] = "few examples, smallest files"
    peft: ClassVar[PeftKind] = PeftKind(
        "IA3",
        tensors=((PeftTensor("ia3_l", ("L", "K")),),),
        names={"feedforward_modules": "feedforward_modules"},
        ignored=frozenset({"init_ia3_weights"}),
        module_lists=("feedforward_modules",),
        on_conv1d=True,
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"init_ia3_weights": True}
    refused: ClassVar[Mapping[str, str]] = {
        "dropout": "(IA)^3 scales the activations themselves, so there is nothing to drop; set it to 0",
        "rank_pattern": "(IA)^3 has no rank",
        "alpha_pattern": "(IA)^3 has no alpha",
    }
    unused: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    type: Literal["ia3"] = "ia3"
    feedforward_modules: str | tuple[str, ...] = ("down_proj", "fc2", "fc_out", "dense_4h_to_h")
    """Targets whose inputs are scaled, not their outputs: names or one regular expression. This costs a second pass
    through these layers."""

    @classmethod
    def settings_from_tensors(cls, modules: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Feed-forward layers are those with a factor for every input."""
        return {"feedforward_modules": tuple(name for name, own in modules.items() if own["ia3_l"].shape[0] == 1)}

    def build(self) -> Variant:
        """An `Ia3` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Ia3(self.feedforward_modules)


class Ia3(Variant, SiteSetup, BiasMerge):
    """`ia3_l` (O, 1), or (1, D) in feed-forward layers, starts at one."""

    def __init__(self, feedforward: str | tuple[str, ...]) -> None:
        self.feedforward = feedforward
        self.of_inputs: set[int] = set()

    def setup(self, site: AdapterSite, rank: int) -> None:
        """Sort the layers by name."""
        del rank
        self.of_inputs = {id(layer) for name, layer in site.layers.items() if matches(name, self.feedforward)}

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Ones."""
        del rank, scale, generator
        return {
            "ia3_l": torch.ones(1, base.in_features) if id(base) in self.of_inputs else torch.ones(base.out_features, 1)
        }

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """l * (W x + b), or W (l * x) + b."""
        del scale
        factor = tensors["ia3_l"].to(x_TD.dtype)
        if _is_of_outputs(factor):
            return y_TO * factor.flatten()
        return frozen_product(x_TD * factor.flatten(), base)

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """Rows or columns scaled."""
        del scale
        wide = torch.promote_types(weight_OD.dtype, tensors["ia3_l"].dtype)
        return weight_OD.to(wide) * tensors["ia3_l"].to(wide)

    def merge_bias(self, bias_O: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        """Scaled where outputs are."""
        factor = tensors["ia3_l"]
        return (bias_O * factor.flatten()).to(bias_O.dtype) if _is_of_outputs(factor) else bias_O


def _is_of_outputs(factor: torch.Tensor) -> bool:
    return factor.shape[1] == 1
