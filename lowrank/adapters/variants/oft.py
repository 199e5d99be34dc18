"""OFT: the input is rotated in blocks before it meets the weight (arXiv:2306.07280, in the form of arXiv:2506.19847).

y = W (R x) + b, R block-diagonal and orthogonal: the Cayley transform of a skew-symmetric matrix, by default through
five terms of its Neumann series, as in PEFT. The base layer runs a second time, on the rotated input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.adapters.variants.base import Tensors, Variant
from lowrank.models.storages import BaseLinear
from lowrank.models.storages.packed import frozen_product
from lowrank.settings import Positive


class OFTConfig(AdapterSettings):
    """Orthogonal fine-tuning. It has a block size, but no rank, alpha or dropout."""

    paper: ClassVar[str] = "arXiv:2306.07280"
    when: ClassVar[str] = "keeping what the base knows"
    peft: ClassVar[PeftKind] = PeftKind(
        "OFT",
        tensors=((PeftTensor("oft_R", ("N", "K"), in_module=True),),),
        names={
            "block_size": "oft_block_size",
            "use_cayley_neumann": "use_cayley_neumann",
            "num_cayley_neumann_terms": "num_cayley_neumann_terms",
        },
        ignored=frozenset({"module_dropout", "init_weights", "eps"}),
    )
    peft_fields: ClassVar[Mapping[str, Any] | None] = {
        "r": 0, "module_dropout": 0.0, "coft": False, "block_share": False, "init_weights": True,
        "peft_version": "0.18.0",  # since then the polynomial is the one below
    }  # fmt: skip
    refused: ClassVar[Mapping[str, str]] = {
        "dropout": "OFT rotates the input, so there is nothing to drop; set it to 0",
        "rank_pattern": "OFT has no rank; it has block_size",
        "alpha_pattern": "OFT has no alpha",
    }
    unused: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    type: Literal["oft"] = "oft"
    block_size: Positive = 32
    """Inputs that are rotated together, PEFT's `oft_block_size`; must divide the width of every target."""
    use_cayley_neumann: bool = True
    """A polynomial in place of the exact rotation, which needs a linear solve per block."""
    num_cayley_neumann_terms: Positive = 5
    """Terms of that polynomial."""

    def build(self) -> Variant:
        """An `Oft` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return Oft(self.block_size, self.num_cayley_neumann_terms if self.use_cayley_neumann else None)


class Oft(Variant):
    """`oft_R` (D / b, b (b - 1) / 2): the upper triangles of the skew-symmetric blocks, zero at the start."""

    def __init__(self, block_size: int, num_terms: int | None) -> None:
        self.block_size = block_size
        self.num_terms = num_terms

    def init(self, base: BaseLinear, rank: int, scale: float, generator: torch.Generator) -> Tensors:
        """No rotation."""
        del rank, scale, generator
        size = self.block_size
        if base.in_features % size:
            raise ValueError(f"adapter.block_size {size} does not divide its {base.in_features} inputs")
        return {"oft_R": torch.zeros(base.in_features // size, size * (size - 1) // 2)}

    def apply(
        self, x_TD: torch.Tensor, y_TO: torch.Tensor, base: BaseLinear, scale: float, tensors: Tensors
    ) -> torch.Tensor:
        """W (R x) + b."""
        del y_TO, scale
        rotation_Nbb = self._rotation(tensors["oft_R"]).to(x_TD.dtype)
        return frozen_product(_rotated(x_TD, rotation_Nbb), base)

    def merge(self, weight_OD: torch.Tensor, scale: float, tensors: Tensors) -> torch.Tensor:
        """W R."""
        del scale
        rotation_Nbb = self._rotation(tensors["oft_R"])
        wide = torch.promote_types(weight_OD.dtype, rotation_Nbb.dtype)
        return _rotated(weight_OD.to(wide), rotation_Nbb.to(wide).transpose(1, 2))

    def _rotation(self, triangle: torch.Tensor) -> torch.Tensor:
        """(N, b, b) from the upper triangles (N, b (b - 1) / 2); x is multiplied from the left."""
        num_blocks, size = len(triangle), self.block_size
        rows, columns = torch.triu_indices(size, size, 1, device=triangle.device)
        skew = triangle.new_zeros(num_blocks, size, size).index_put(
            (torch.arange(num_blocks, device=triangle.device)[:, None], rows, columns), triangle
        )
        skew = skew - skew.transpose(1, 2)
        identity = torch.eye(size, dtype=triangle.dtype, device=triangle.device).expand_as(skew)
        if self.num_terms is None:
            return torch.linalg.solve(identity + skew, identity - skew, left=False)
        # (I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ..., cut as PEFT cuts it: the last power once, 3 terms like 4
        last = 3 if self.num_terms == 3 else self.num_terms - 1
        rotation, power = identity, skew
        for exponent in range(1, last + 1):
            rotation = rotation + power * (1.0 if exponent == last > 1 else 2.0)
            power = power @ skew
        return rotation


def _rotated(x_TD: torch.Tensor, rotation_Nbb: torch.Tensor) -> torch.Tensor:
    """Each block of columns times its own matrix."""
    num_blocks, size, _ = rotation_Nbb.shape
    return torch.einsum("tnb,nbc->tnc", x_TD.reshape(-1, num_blocks, size), rotation_Nbb).reshape(x_TD.shape)
