"""The README.md in an adapter's folder: what it is and how to load it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_config import BaseDescription

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_CARD = """---
{front}---

# Adapter

A `{title}` adapter with {num_parameters:,} parameters {where} {base}, trained with \
lowrank.{notes}

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


_ABOUT_A_PICTURE = """

from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained({base!r})
picture, text = {{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is this?"}}
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": [picture, text]}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
).to(model.dtype)
print(processor.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))"""


def pipeline_tag(sees: bool) -> str:
    """The hub's name for what a model is for. `sees`: it can be asked about pictures."""
    return "image-text-to-text" if sees else "text-generation"


def picture_code(processor: str) -> str:
    """Python that asks `model` about a picture; `processor`: where that of its base lies."""
    return _ABOUT_A_PICTURE.format(base=processor)


def loading_code(config: AdapterConfig, base: str, adapter: str, described: BaseDescription) -> str:
    """Python that loads the adapter with the library whose files it has, and asks about a picture where the base sees.
    `base`: where that lies for whoever reads it."""
    code = _ADAPTERHUB if isinstance(config, BottleneckSettings) else _PEFT
    more = picture_code(base) if described.sees else ""
    return code.format(base=base, adapter=adapter, auto_class=described.auto_class) + more


def model_card(
    config: AdapterConfig, where: str, num_parameters: int, base: BaseDescription, notes: Sequence[str] = ()
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `where`: `on 14 modules of`. `notes`: what to know
    before loading it."""
    base_name = base.name
    on_hub = _HUB_NAME.fullmatch(base_name) is not None and not os.path.exists(base_name)
    library = "adapter-transformers" if isinstance(config, BottleneckSettings) else "peft"
    front = {"library_name": library, "pipeline_tag": pipeline_tag(base.sees)}
    if on_hub:  # the hub refuses a card whose base_model is a path
        front["base_model"] = base_name
    lines = [f"{key}: {value}\n" for key, value in sorted(front.items())]
    return _CARD.format(
        front="".join([*lines, f"tags:\n- {config.peft.type.lower()}\n- lowrank\n"]),
        title=config.title,
        num_parameters=num_parameters,
        where=where,
        base=f"`{base_name}`" if on_hub else "its base",
        notes="".join(f"\n\n{note}." for note in notes),
        code=loading_code(config, base_name if on_hub else "path/of/the/base", "path/of/this/folder", base),
    )
