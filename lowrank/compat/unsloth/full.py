"""`full_finetuning=True`: transformers' own model, whose weights the trainers train, with Unsloth's ways to save it."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

from lowrank.compat.unsloth import saving
from lowrank.models.base import Base
from lowrank.models.config import ModelConfig

_BASE = "lowrank_base"


def prepared(base: Base, settings: ModelConfig) -> Any:
    """The base's model, in training, able to save itself in each of Unsloth's forms."""
    model = base.model
    vars(model)[_BASE] = base  # past nn.Module, which would register what is in it
    model.settings = settings
    model.is_front_of_lowrank = True
    for name in ("save_pretrained_merged", "save_pretrained_gguf", "push_to_hub_merged", "push_to_hub_gguf"):
        setattr(model, name, MethodType(globals()[name], model))
    return model.train()


def is_full(model: Any) -> bool:
    """Whether it came from `prepared`."""
    return _BASE in vars(model)


def tokenizer_of(model: Any) -> Any:
    """The tokenizer that a model of this front was loaded with."""
    return (vars(model)[_BASE] if is_full(model) else model.base).tokenizer


def save_pretrained_merged(
    model: Any, save_directory: str | Path, tokenizer: Any = None, save_method: Any = "merged_16bit", **others: Any
) -> None:
    """The whole model. See `saving.save_merged`."""
    saving.save_merged(model, Path(save_directory), tokenizer, save_method, **others)


def save_pretrained_gguf(
    model: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: Any = "fast_quantized",
    **others: Any,
) -> None:
    """GGUF files. See `saving.save_gguf`."""
    saving.save_gguf(model, Path(save_directory), tokenizer, quantization_method, **others)


def push_to_hub_merged(
    model: Any, repo_id: str, tokenizer: Any = None, save_method: Any = "merged_16bit", **others: Any
) -> dict[str, Any]:
    """The whole model, as a repository."""
    return saving.push(saving.save_merged, model, repo_id, tokenizer=tokenizer, save_method=save_method, **others)


def push_to_hub_gguf(
    model: Any, repo_id: str, tokenizer: Any = None, quantization_method: Any = "fast_quantized", **others: Any
) -> dict[str, Any]:
    """GGUF files, as a repository."""
    return saving.push(
        saving.save_gguf, model, repo_id, tokenizer=tokenizer, quantization_method=quantization_method, **others
    )
