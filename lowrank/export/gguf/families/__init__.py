"""One file for a group of architectures; each has `FAMILIES`: transformers' `model_type` -> `Family`."""

from __future__ import annotations

import importlib
import pkgutil

from lowrank.export.gguf.pieces import Family


def families() -> dict[str, Family]:
    """Everything that can be converted, by transformers' `model_type`."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").FAMILIES
    return dict(sorted(found.items()))
