"""Parallel adapters: a bottleneck beside the MLP of every layer, fed by the stream (He et al., arXiv:2110.04366)."""

from __future__ import annotations

from typing import ClassVar, Literal

from lowrank.adapters.bottleneck import BottleneckSettings


class ParallelConfig(BottleneckSettings):
    """AdapterHub's `parallel` (`par_bn`): wide, scaled by 4, and exactly the base at the start."""

    paper: ClassVar[str] = "arXiv:2110.04366"
    when: ClassVar[str] = "many examples and room for a wide bottleneck; cannot be merged"
    type: Literal["parallel"] = "parallel"
    mh_adapter: bool = False
    """An adapter behind each layer's attention."""
    reduction_factor: float | dict[str, float] = 2.0
    """The hidden size over the width of the bottleneck; or for single layers, by number: `{"1": 8, "default": 16}`."""
    non_linearity: str = "relu"
    """The activation in the bottleneck, by transformers' names: relu, swish, gelu, tanh ... or leakyrelu."""
    is_parallel: bool = True
    """The adapter reads the stream that goes around the block, not the block's output."""
    scaling: float | Literal["learned", "channel"] = 4.0
    """What the adapter's output is multiplied by: a number, or one (`learned`) or D (`channel`) that are trained."""
    init_weights: Literal["bert", "mam_adapter", "houlsby"] = "mam_adapter"
    """How it begins: `bert` (normal, 0.02) and `houlsby` (truncated, 0.01) near the base; `mam_adapter` at it."""
