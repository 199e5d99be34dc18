"""What an adapter adds to a frozen linear layer (the PEFT method): one file each.

A variant file has a settings class with `type` (an `AdapterSettings`) whose `build()` returns a `Variant` (base.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowrank.adapters.config import AdapterSettings
from lowrank.settings import choice_of

if TYPE_CHECKING:
    from lowrank.adapters.variants.base import Variant

ABSENT = {
    "bottleneck": "say which: houlsby, pfeiffer or parallel",
    "double_seq_bn": "it is called houlsby",
    "seq_bn": "it is called pfeiffer",
    "par_bn": "it is called parallel",
    "scaled_parallel": "it is parallel with scaling: learned",
    "compacter": "its hypercomplex layers are not there; use pfeiffer with a large reduction_factor, or vera",
}
"""Methods that people know from PEFT and elsewhere, and what to use."""

if TYPE_CHECKING:

    class AdapterConfig(AdapterSettings):
        """What every variant's settings class offers."""

        type: str

        def build(self) -> Variant: ...
else:
    AdapterConfig = choice_of(
        __name__, default="lora", absent=ABSENT, page="docs/add-a-variant.md", base=AdapterSettings
    )
