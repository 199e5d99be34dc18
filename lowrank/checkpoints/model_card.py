"""The README.md in an adapter's folder: what it is and how to load it."""

from __future__ import annotations

import os
import re

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_config import BaseDescription

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """---
{front}---

# Adapter

A `{title}` adapter with {num_parameters:,} parameters {where} {base}, trained with \
lowrank.{incompatibility}

```python
{code}
```
"""
_PEFT = """from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, {adapter!r})"""
_ADAPTERHUB = """import adapters
from transformers import {auto_class}

model = {auto_class}.from_pretrained({base!r})
adapters.init(model)
model.load_adapter({adapter!r}, use_safetensors=True, set_active=True)"""


def loading_code(config: AdapterConfig, base: str, adapter: str, auto_class: str) -> str:
    """Python that loads the adapter with the library whose files it has; `auto_class`: transformers' for the base."""
    code = _ADAPTERHUB if isinstance(config, BottleneckSettings) else _PEFT
    return code.format(base=base, adapter=adapter, auto_class=auto_class)


def model_card(
    config: AdapterConfig, where: str, num_parameters: int, base: BaseDescription, incompatibility: str | None = None
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `where`: `on 14 modules of`. `incompatibility`: what
    to know before loading it."""
    base_name = base.name
    on_hub = _HUB_NAME.fullmatch(base_name) is not None and not os.path.exists(base_name)
    library = "adapter-transformers" if isinstance(config, BottleneckSettings) else "peft"
    front = {"library_name": library, "pipeline_tag": "text-generation"}
    if on_hub:  # the hub refuses a card whose base_model is a path
        front["base_model"] = base_name
    lines = [f"{key}: {value}\n" for key, value in sorted(front.items())]
    return _CARD.format(
        front="".join([*lines, f"tags:\n- {config.peft.type.lower()}\n- lowrank\n"]),
        title=config.title,
        num_parameters=num_parameters,
        where=where,
        base=f"`{base_name}`" if on_hub else "its base",
        incompatibility=f"\n\n{incompatibility}." if incompatibility else "",
        code=loading_code(config, base_name if on_hub else "path/of/the/base", "path/of/this/folder", base.auto_class),
    )
