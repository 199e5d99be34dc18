"""Tiny bases on disk with random adapters far from the identity, as sources of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.export.source import Source
from lowrank.export.targets.merged import MergedExportConfig
from lowrank.models.config import ModelConfig
from lowrank.models.loading.quiet import quiet_transformers
from tests.checkpoints.test_peft_layout import random_adapter
from tests.tiny_models import make_model


def make_source(
    folder: Path, config: Any | None, family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any
) -> Source:
    """A random base in `folder`/base and an adapter by `config` (None: no adapter). No tokenizer."""
    model = make_model(family, dtype, **changes)
    with quiet_transformers():
        model.save_pretrained(folder / "base")
    adapter = None if config is None else random_adapter(load(folder / "base", dtype), config)
    return source_of(folder / "base", adapter)


def source_of(base: Path, adapter: AdapterOnDisk | None, **settings: Any) -> Source:
    model = ModelConfig(path=str(base), device="cpu")
    return Source("mine", base, model, adapter, None, None, **settings)


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """As any user of transformers loads it."""
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
    if dtype == torch.float64:
        model.config._experts_implementation = "eager"  # grouped expert kernels know no float64
    return model


def write_merged(source: Source, folder: Path, **settings: Any) -> Path:
    target = MergedExportConfig(**settings).build()
    target.needs(source)
    folder.mkdir()
    target.write(source, folder, lambda done, total, what="": None)
    return folder
