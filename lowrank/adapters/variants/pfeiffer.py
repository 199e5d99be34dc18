"""Pfeiffer's bottleneck adapters: behind the MLP of every layer alone (arXiv:2005.00247)."""

from __future__ import annotations

from typing import ClassVar, Literal

from lowrank.adapters.bottleneck import BottleneckSettings


class PfeifferConfig(BottleneckSettings):
    """AdapterHub's `pfeiffer` (`seq_bn`): half of Houlsby's, and nearly as good."""

    paper: ClassVar[str] = "arXiv:2005.00247"
    when: ClassVar[str] = "half the size and time of houlsby; cannot be merged"
    type: Literal["pfeiffer"] = "pfeiffer"
    mh_adapter: bool = False
    """An adapter behind each layer's attention."""
    non_linearity: str = "relu"
    """The activation in the bottleneck, by transformers' names: relu, swish, gelu, tanh ... or leakyrelu."""
    original_ln_before: bool = True
    """The stream is added to what the adapter reads."""
