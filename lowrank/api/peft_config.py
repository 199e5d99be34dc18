"""A `LoraConfig` of PEFT that somebody gave as `adapter`: the settings that mean the same."""

from __future__ import annotations

import dataclasses
from typing import Any

_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
_NO_MATTER = ("task_type", "peft_type", "inference_mode", "base_model_name_or_path", "auto_mapping", "peft_version")
"""Fields that say where a file comes from, or what is known here anyway."""


def from_lora_config(given: Any) -> str | None:
    """`"give adapter={'rank': 8, 'alpha': 16.0}"` for an object of PEFT's LoraConfig, with the names of its other
    fields that were set; None for anything else. PEFT itself is not imported."""
    if not dataclasses.is_dataclass(given) or isinstance(given, type) or type(given).__name__ != "LoraConfig":
        return None
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    same = {
        ours: sorted(values[name]) if isinstance(values[name], (set, tuple, list)) else values[name]
        for name, ours in _NAMES.items()
        if values.get(name) is not None
    }
    others = [
        field.name
        for field in dataclasses.fields(given)
        if field.name not in (*_NAMES, *_NO_MATTER) and values[field.name] != _default(field)
    ]
    besides = (
        f"; it also sets {', '.join(others)}: see docs/settings.md for what they are called here" if others else ""
    )
    return f"give adapter={same}{besides}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default
