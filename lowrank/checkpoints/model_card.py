"""The README.md in an adapter's folder: what it is and how to load it."""

from __future__ import annotations

import os
import re

from lowrank.adapters.variants import AdapterConfig

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """---
{front}---

# Adapter

A `{title}` adapter with {num_parameters:,} parameters {where} {base}, trained with \
lowrank.{trouble}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({path!r})
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```
"""


def model_card(
    config: AdapterConfig, where: str, num_parameters: int, base_name: str, trouble: str | None = None
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `where`: `on 14 modules of`. `trouble`: what to know
    before loading it."""
    on_hub = _HUB_NAME.fullmatch(base_name) is not None and not os.path.exists(base_name)
    front = {"library_name": "peft", "pipeline_tag": "text-generation"}
    if on_hub:  # the hub refuses a card whose base_model is a path
        front["base_model"] = base_name
    lines = [f"{key}: {value}\n" for key, value in sorted(front.items())]
    return _CARD.format(
        front="".join([*lines, f"tags:\n- {config.peft_type.lower()}\n- lowrank\n"]),
        title=config.title,
        num_parameters=num_parameters,
        where=where,
        base=f"`{base_name}`" if on_hub else "its base",
        trouble=f"\n\n{trouble}." if trouble else "",
        path=base_name if on_hub else "path/of/the/base",
    )
