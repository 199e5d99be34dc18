"""LoRA-FA: LoRA whose A stays as drawn (arXiv:2308.03303).

No layer's input needs to be kept for the backward pass, only x A^T (T, R): with rank 16 on a width of 4096 that is
1/256 of the memory, where nothing else keeps the input.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.variants.base import FileForm, Tensors, Variant
from lowrank.adapters.variants.lora import Lora, LoraConfig


class LoraFAConfig(AdapterSettings):
    """LoRA with A frozen; saved as plain LoRA."""

    paper: ClassVar[str] = "arXiv:2308.03303"
    when: ClassVar[str] = "when activations are what does not fit"
    type: Literal["lora_fa"] = "lora_fa"

    def build(self) -> Variant:
        """A `LoraFa` as these settings say. It has no tensors of its own: the bank keeps those that `init` makes."""
        return LoraFa()

    def as_saved(self) -> AdapterSettings:
        """Plain LoRA."""
        return LoraConfig(**self.shared())


class LoraFa(Lora, FileForm):
    """LoRA but for what is trained."""

    frozen = frozenset({"lora_A"})

    def saved(self, tensors: Tensors) -> Tensors:
        """Both, as LoRA."""
        return tensors
