"""Which parameters weight decay does not reach: norms and biases, by the rule of transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_PATTERN = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def undecayed(names: Iterable[str], model: nn.Module) -> set[str]:
    """Of `names` (parameters of `model`, or of adapters on it), those that are left out: by a word in the name, or
    because they belong to a `LayerNorm`."""
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    return {name for name in names if _PATTERN.search(name.lower()) or name.rpartition(".")[0] in norms}
