"""Integer codes with a scale and a zero point for each group of weights: what HQQ, GPTQ, AWQ, compressed-tensors and
torchao all come down to, whatever order their files have. One module, one dequantizer, one gradient."""

from __future__ import annotations

import torch

from lowrank.kernels.affine import dequantize
from lowrank.kernels.bit_packing import pack
from lowrank.kernels.scratch import scratch
from lowrank.models.storages.packed import PackedLinear


class AffineLinear(PackedLinear):
    """W[o, d] = (code[o, d] - zero[o, g]) * scale[o, g], g the group of column d."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group: torch.Tensor | None

    def __init__(
        self,
        code_OD: torch.Tensor,
        bits: int,
        scale_OG: torch.Tensor,
        zero_OG: torch.Tensor,
        group_size: int,
        bias_O: torch.Tensor | None,
        dtype: torch.dtype,
        group_D: torch.Tensor | None = None,
    ) -> None:
        """`zero_OG` may be (1, 1), one for all. `group_D`: the group of each column where groups are no neighbors."""
        out_features, in_features = code_OD.shape
        super().__init__(in_features, out_features, bias_O, dtype)
        self.bits, self.group_size = bits, group_size
        self.register_buffer("packed", pack(code_OD, bits))
        self.register_buffer("scale", scale_OG.contiguous())
        self.register_buffer("zero", zero_OG.contiguous())
        self.register_buffer("group", group_D)

    def dense_weight(self) -> torch.Tensor:
        """W as (O, D), in scratch memory."""
        out_OD = scratch((self.out_features, self.in_features), self.dtype, self.packed.device)
        return dequantize(self.packed, self.bits, self.scale, self.zero, self.group_size, out_OD, self.group)

    def extra_repr(self) -> str:
        """With bits and group size."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"
