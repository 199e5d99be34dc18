"""Houlsby's bottleneck adapters: behind the attention and behind the MLP of every layer (arXiv:1902.00751)."""

from __future__ import annotations

from typing import ClassVar, Literal

from lowrank.adapters.bottleneck import BottleneckSettings


class HoulsbyConfig(BottleneckSettings):
    """AdapterHub's `houlsby` (`double_seq_bn`): the first adapters; they stay a part of the model that runs."""

    paper: ClassVar[str] = "arXiv:1902.00751"
    when: ClassVar[str] = "adapters as AdapterHub has them, or updates that should not be linear; cannot be merged"
    type: Literal["houlsby"] = "houlsby"
