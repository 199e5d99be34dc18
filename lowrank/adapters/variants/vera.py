"""VeRA: random A and B shared by all layers, a trained vector on either (arXiv:2310.11454).

y += b * B (d * A x). A (R, D) and B (O, R) are the first columns and rows of matrices as large as the adapter's
largest layer, drawn from `projection_prng_key` exactly as PEFT draws them, so files hold the vectors alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import AdapterSite, SharedTensors, SiteSetup, Tensors, Variant
from lowrank.models.storages import BaseLinear
from lowrank.settings import Positive


class VeraConfig(AdapterSettings):
    """Vector-based random matrix adaptation: about a hundredth of LoRA's parameters."""

    paper: ClassVar[str] = "arXiv:2310.11454"
    when: ClassVar[str] = "very many adapters, tiny files"
    peft: ClassVar[PeftKind] = PeftKind(
        "VERA",
        tensors=((PeftTensor("vera_lambda_b", ("O",)), PeftTensor("vera_lambda_d", ("R",))),),
        shared=("vera_A", "vera_B"),
        names={
            "rank": "r",
            "dropout": "vera_dropout",
            "d_initial": "d_initial",
            "projection_prng_key": "projection_prng_key",
        },
        ignored=frozenset({"save_projection", "init_weights"}),
        on_conv1d=True,
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {"save_projection": False, "init_weights": True}
    refused: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "all layers share A and B, so they have one rank; use adapter.rank",
        "alpha_pattern": "VeRA has no alpha; its vectors learn the scale",
    }
    unused: ClassVar[tuple[str, ...]] = ("alpha",)
    type: Literal["vera"] = "vera"
    rank: Positive = 256
    """Rank of the shared matrices, PEFT's `r`; needs to be higher than LoRA's."""
    d_initial: float = 0.1
    """Start of the vector between A and B."""
    projection_prng_key: int = 0
    """What A and B are drawn from; adapters with the same key can be served together."""

    def fields_from_tensors(self, names: Collection[str]) -> dict[str, Any]:
        """PEFT looks for A and B in the file only where this says so."""
        return {} if self.peft.shared[0] not in names else {"save_projection": True}

    def build(self) -> Variant:
        """A `Vera` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Vera(self.d_initial, self.projection_prng_key)


class Vera(Variant, SiteSetup, SharedTensors):
    """`vera_lambda_b` (O) starts at zero, `vera_lambda_d` (R) at `d_initial`; `vera_A` (R, D) and `vera_B` (O, R)
    are views of the shared matrices."""

    frozen = frozenset({"vera_A", "vera_B"})

    def __init__(self, d_initial: float, key: int) -> None:
        self.d_initial = d_initial
        self.key = key
        self.shared = {}

    def scale(self, rank: int, alpha: float) -> float:
        """1."""
        del rank, alpha
        return 1.0

    def setup(self, site: AdapterSite, rank: int) -> None:
        """Draw A and B, as large as the largest layer."""
        drawn = _projections([_shape(layer) for layer in site.layers.values()], rank, self.key)
        self.shared = {key: tensor.to(site.device, site.dtype) for key, tensor in drawn.items()}

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """Identity at the start, since the outer vector is zero."""
        del scale, generator
        shared = self.shared or _projections([_shape(base)], rank, self.key)
        return {
            "vera_lambda_b": torch.zeros(base.out_features),
            "vera_lambda_d": torch.full((rank,), self.d_initial),
            "vera_A": shared["vera_A"][:, : base.in_features],
            "vera_B": shared["vera_B"][: base.out_features],
        }

    def shared_tensors(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Tensors]:
        """Views of the matrices that all layers share: the file's, if it has them, as PEFT's have by default."""
        shared = tensors if "vera_A" in tensors else _projections(shapes.values(), rank, self.key)
        return {
            name: {"vera_A": shared["vera_A"][:, :columns], "vera_B": shared["vera_B"][:rows]}
            for name, (rows, columns) in shapes.items()
        }

    def as_low_rank(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        """(d * A, b * B)."""
        A_RD, B_OR = tensors["vera_A"], tensors["vera_B"]
        return tensors["vera_lambda_d"][:, None] * A_RD, tensors["vera_lambda_b"][:, None] * B_OR


def _shape(layer: BaseLinear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _projections(shapes: Collection[tuple[int, int]], rank: int, key: int) -> dict[str, torch.Tensor]:
    """Uniform with Kaiming's bound, A first, on the CPU in float32: PEFT's random numbers."""
    generator = torch.Generator().manual_seed(key)
    tallest, widest = (max(sizes) for sizes in zip(*shapes))
    drawn = {}
    for name, shape in (("vera_A", (rank, widest)), ("vera_B", (tallest, rank))):
        bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(shape[1])
        drawn[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return drawn
