"""Adapters that were trained on a language model alone, on a composite base that has this model inside.

transformers' `AutoModelForCausalLM` takes the text class of some composite checkpoints (Qwen3.5), so what TRL and PEFT
write there names `model.layers...`, which in the whole model are `model.language_model.layers...`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.models.layers import language_model

_LISTS = ("target_modules", "modules_to_save", "target_parameters", "exclude_modules")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def on_composite(adapter: AdapterOnDisk, model: Any) -> AdapterOnDisk:
    """The adapter with the names its layers have in `model` (transformers', loaded or without memory); itself where
    they are those already."""
    language, inner = language_model(model)
    if not language:
        return adapter

    def named(name: str) -> str:
        first, _, rest = name.partition(".")
        child = rest.partition(".")[0]
        outer = getattr(model, first, None)
        elsewhere = child and not hasattr(outer, child) and hasattr(inner, child)
        return f"{language}.{rest}" if elsewhere else name

    targets = {named(name): target for name, target in adapter.targets.items()}
    if targets == adapter.targets and all(named(name) == name for name in adapter.tensors):
        return adapter
    return replace(
        adapter,
        config=_renamed(adapter.config, named),
        tensors={named(name): tensor for name, tensor in adapter.tensors.items()},
        targets=targets,
        base_tensors={named(name): tensor for name, tensor in adapter.base_tensors.items()},
        notes=(*adapter.notes, f"it was trained on the language model alone; here that is {language}"),
    )


def _renamed(config: Any, named: Callable[[str], str]) -> Any:
    fields: dict[str, Any] = {}
    for name in _LISTS:
        value = getattr(config, name)
        if not isinstance(value, str):
            fields[name] = tuple(map(named, value))
    for name in _PATTERNS:
        fields[name] = {named(key): value for key, value in getattr(config, name).items()}
    return config.model_copy(update=fields)
