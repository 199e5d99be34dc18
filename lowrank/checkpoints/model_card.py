"""The README.md in an adapter's folder: what it is and how to load it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_config import BaseDescription
from lowrank.hub_names import is_hub_name

_CARD = """---
{front}---

# Adapter

A `{title}` {kind} with {num_parameters:,} parameters {where} {base}, trained with \
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


_REWARDS = """import lowrank

judge = lowrank.load({path!r})
question = {{"role": "user", "content": "What is 2 + 1?"}}
answers = [[question, {{"role": "assistant", "content": text}}] for text in ("3", "12")]
print(judge.rewards(answers))  # a number for each answer; higher is better"""


def pipeline_tag(supports_images: bool, *, is_reward_model: bool = False) -> str:
    """The hub's name for what a model is for."""
    if is_reward_model:
        return "text-classification"
    return "image-text-to-text" if supports_images else "text-generation"


def image_code(processor: str) -> str:
    """Python that asks `model` about a picture; `processor`: where that of its base lies."""
    return _ABOUT_A_PICTURE.format(base=processor)


def reward_code(path: str) -> str:
    """Python that has a reward model judge two answers."""
    return _REWARDS.format(path=path)


def loading_code(config: AdapterConfig, base: str, adapter: str, described: BaseDescription) -> str:
    """Python that loads the adapter with the library whose files it has, and asks about a picture where the base takes
    them. `base`: where that lies for whoever reads it."""
    code = _ADAPTERHUB if isinstance(config, BottleneckSettings) else _PEFT
    more = image_code(base) if described.supports_images else ""
    return code.format(base=base, adapter=adapter, auto_class=described.auto_class) + more


def model_card(
    config: AdapterConfig,
    where: str,
    num_parameters: int,
    base: BaseDescription,
    notes: Sequence[str] = (),
    *,
    is_reward_model: bool = False,
) -> str:
    """Markdown with the metadata that the Hugging Face hub reads. `where`: `on 14 modules of`. `notes`: what to know
    before loading it. `is_reward_model`: its value head is what was trained."""
    base_name = base.name
    on_hub = is_hub_name(base_name) and not os.path.exists(base_name)
    library = "adapter-transformers" if isinstance(config, BottleneckSettings) else "peft"
    front = {
        "library_name": library,
        "pipeline_tag": pipeline_tag(base.supports_images, is_reward_model=is_reward_model),
    }
    if on_hub:  # the hub refuses a card whose base_model is a path
        front["base_model"] = base_name
    tags = [config.peft.type.lower(), "lowrank", *(["reward-model"] if is_reward_model else [])]
    adapter, code_base = "path/of/this/folder", base_name if on_hub else "path/of/the/base"
    lines = [f"{key}: {value}\n" for key, value in sorted(front.items())]
    return _CARD.format(
        front="".join([*lines, "tags:\n", *(f"- {tag}\n" for tag in tags)]),
        title=config.title,
        num_parameters=num_parameters,
        where=where,
        base=f"`{base_name}`" if on_hub else "its base",
        kind="reward model" if is_reward_model else "adapter",
        notes="".join(f"\n\n{note}." for note in notes),
        code=reward_code(adapter) if is_reward_model else loading_code(config, code_base, adapter, base),
    )
