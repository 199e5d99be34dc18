"""Python that asks a whole model written by an export, with transformers alone; for its README.md."""

from __future__ import annotations

from pathlib import Path

import transformers

from lowrank.checkpoints.model_card import image_code
from lowrank.models.loading.model_class import is_composite, model_class
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import FILE_FAULTS

_PLAIN = """from transformers import pipeline

ask = pipeline("text-generation", "{path}")
print(ask([{{"role": "user", "content": "Hello"}}])[0]["generated_text"][-1]["content"])"""
_COMPOSITE = """from transformers import {auto_class}, AutoTokenizer

model, tokenizer = {auto_class}.from_pretrained("{path}"), AutoTokenizer.from_pretrained("{path}")
asked = [{{"role": "user", "content": [{{"type": "text", "text": "Hello"}}]}}]
tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=100)[0]))"""


TO_A_SERVER = "\n\nPictures go to a server as OpenAI's `image_url` parts, base64 in a `data:` URL."


def usage_code(base: Path, path: str) -> str:
    """`base`: a folder with the config.json of a model of the same class; `path`: what is to be asked. The pipeline for
    text knows no models with towers."""
    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
        except FILE_FAULTS:  # its own code, which need not run for this
            return _PLAIN.format(path=path)
    if not is_composite(config):
        return _PLAIN.format(path=path)
    supports_images = getattr(config, "vision_config", None) is not None
    code = _COMPOSITE.format(auto_class=model_class(config).__name__, path=path)
    return code + (image_code(path) if supports_images else "")
