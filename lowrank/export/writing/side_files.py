"""What lies beside the weights: configuration, generation settings, tokenizer, and the template training used."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank.checkpoints.model_config import write_config
from lowrank.errors import ModelError
from lowrank.export.source import Source
from lowrank.export.writing.pixel_limits import write_pixel_limits
from lowrank.foreign_files import leads_out, read_json, write_json

_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.index.json",
    "*.pkl", "config.json", "generation_config.json", "README.md", ".*", "optimizer*", "training_args*", "__init__.py",
)  # fmt: skip
"""Weights in any form, and what is written anew. Everything else beside the weights is the base's and stays."""
_TOKENIZER = (
    "tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*",
)  # fmt: skip


def write_side_files(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    untied: bool = False,
    quantization: dict[str, Any] | None = None,
) -> None:
    """config.json with the base's own keys, generation_config.json with every token that ends an answer, all tokenizer
    files byte for byte (written anew where an adapter has tokens of its own), and the template that training used.

    `dtype`: of the weights, None: the base's. `untied`: embedding and head are two tensors now. `quantization`: what
    config.json says of packed weights. Where training showed pictures, the processor's files have its limits of pixels.
    """
    _copy(source.base, folder, lambda name: not _fits(name, _NOT_COPIED))
    if source.own_tokens:
        source.tokenizer.save_pretrained(folder)
    config = config_of(source, dtype=dtype, untied=untied)
    if quantization is not None:
        config["quantization_config"] = quantization
    write_config(folder, config)
    if source.facts.get("pictures"):
        write_pixel_limits(folder, source.model.image_max_pixels, source.model.image_min_pixels)
    write_json(folder / "generation_config.json", generation_config_of(source))
    if source.chat_template is not None:
        write_template(folder, source.chat_template)


def write_tokenizer(source: Source, folder: Path) -> None:
    """The base's tokenizer files alone, with the chat template that training used."""
    _copy(source.base, folder, lambda name: _fits(name, _TOKENIZER))
    if source.own_tokens:
        source.tokenizer.save_pretrained(folder)
    if source.chat_template is not None:
        write_template(folder, source.chat_template)


def config_of(source: Source, *, dtype: torch.dtype | None, untied: bool) -> dict[str, Any]:
    """The base's config.json as its makers wrote it (transformers 5 would rewrite it), with what changed. Weights that
    were quantized are not any more."""
    config = read_json(source.base / "config.json")
    config.pop("quantization_config", None)
    parts = [config, *(part for part in config.values() if isinstance(part, dict) and "vocab_size" in part)]
    if dtype is not None:
        for part in parts:
            for key in ("dtype", "torch_dtype"):
                if key in part or (key == "dtype" and part is config and "torch_dtype" not in part):
                    part[key] = str(dtype).removeprefix("torch.")
    if untied:
        for part in parts:
            part["tie_word_embeddings"] = False
    return config


def generation_config_of(source: Source) -> dict[str, Any]:
    """The base's generation settings; `eos_token_id` lists every token at which an answer ends."""
    path = source.base / "generation_config.json"
    settings: dict[str, Any] = {"_from_model_config": True}
    if path.is_file():
        settings = read_json(path)
    config = read_json(source.base / "config.json")
    given = settings.get("eos_token_id", config.get("eos_token_id"))
    known = given if isinstance(given, list) else [] if given is None else [given]
    ends = [*known, *sorted(source.stop_tokens - set(known))]
    if ends:
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if not path.is_file():
        settings |= {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
    return settings


def write_template(folder: Path, template: str) -> None:
    """Into chat_template.jinja, where transformers 5 looks, and tokenizer_config.json, where older readers do."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    config = read_json(path)
    if isinstance(config.get("chat_template"), list):  # several by name; training used the default
        others = [each for each in config["chat_template"] if each.get("name") != "default"]
        config["chat_template"] = [{"name": "default", "template": template}, *others]
    else:
        config["chat_template"] = template
    write_json(path, config)


def _copy(origin: Path, folder: Path, wanted: Callable[[str], bool]) -> None:
    """ModelError for links out of `origin`: their content would be copied, and pushed, without anybody's asking."""
    out = [path for path in sorted(origin.iterdir()) if wanted(path.name) and leads_out(path, origin)]
    if out:
        names = ", ".join(path.name for path in out[:5])
        raise ModelError(
            f"{origin}: {names}: links that lead out of this folder; their content would be taken along. Copy what "
            "belongs to the model into the folder, and remove the rest"
        )
    for path in sorted(origin.iterdir()):
        if path.is_file() and wanted(path.name):
            shutil.copyfile(path, folder / path.name)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
