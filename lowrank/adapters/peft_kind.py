"""What files in PEFT's layout have of one PEFT type: declared beside the variant, looped over by checkpoints/peft_*.py.

Letters of shapes: R rank, D in-features, O out-features; any other letter is a size of the variant's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class PeftTensor:
    """One tensor of an adapter at one module."""

    name: str
    """By the bank's name: `lora_A`."""
    shape: tuple[str, ...]
    """`("R", "D")`: files whose tensor has other dimensions, or another size where R stands, are refused."""
    in_module: bool = False
    """PEFT keeps it in a module of its own, so its name in files ends in `.weight`."""
    because: str = ""
    """The field of adapter_config.json that asks for it, for the message where it is missing."""

    @property
    def name_in_files(self) -> str:
        """The end of its name in adapter_model.safetensors."""
        return f"{self.name}.weight" if self.in_module else self.name


@dataclass(frozen=True)
class PeftKind:
    """One value of `peft_type`, and all that the files of its adapters have in common."""

    type: str
    """`LORA`."""
    tensors: tuple[tuple[PeftTensor, ...], ...] = ()
    """Groups of tensors: of a group a module has all or none."""
    shared: tuple[str, ...] = ()
    """Tensors that all layers share; PEFT puts them beside the model, under `base_model.`."""
    names: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Settings that adapter_config.json has too, and their names there."""
    fields: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """Fields that every adapter of this type is written with."""
    ignored: frozenset[str] = frozenset()
    """Fields that change nothing in what a trained adapter computes: how it began, what matters in training only."""
    module_lists: tuple[str, ...] = ()
    """Settings that name some of the targets (`feedforward_modules`)."""
    has_patterns: bool = False
    """Its modules may differ in rank (rank_pattern), and in alpha (alpha_pattern) where `names` has an alpha."""
    on_conv1d: bool = False
    """PEFT puts it on layers with a transposed weight too (GPT-2's Conv1D)."""
    has_token_rows: bool = False
    """Its files have a place for rows of single tokens (trainable_token_indices)."""

    def name_in_files(self, name: str) -> str:
        """The end of a tensor's name in files, by the bank's name."""
        return next((own.name_in_files for own in self.all_tensors if own.name == name), name)

    @property
    def all_tensors(self) -> tuple[PeftTensor, ...]:
        """Of all groups."""
        return tuple(tensor for group in self.tensors for tensor in group)


_PAIR = (PeftTensor("lora_A", ("R", "D"), in_module=True), PeftTensor("lora_B", ("O", "R"), in_module=True))
_EMBEDDING_PAIR = (PeftTensor("lora_embedding_A", ("R", "V")), PeftTensor("lora_embedding_B", ("D", "R")))
_LORA: dict[str, Any] = {
    "type": "LORA",
    "names": {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"},
    "fields": {"bias": "none", "init_lora_weights": True},
    "ignored": frozenset(
        {
            "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
            "qalora_group_size",
        }
    ),
    "has_patterns": True,
    "on_conv1d": True,
    "has_token_rows": True,
}  # fmt: skip
LORA = PeftKind(tensors=(_PAIR, _EMBEDDING_PAIR), **_LORA)
"""PEFT's LoRA, and every variant that is saved as it."""


def lora_with(*tensors: PeftTensor) -> PeftKind:
    """PEFT's LoRA with more tensors beside A and B of every linear layer (DoRA's magnitude)."""
    return PeftKind(tensors=((*_PAIR, *tensors), _EMBEDDING_PAIR), **_LORA)
