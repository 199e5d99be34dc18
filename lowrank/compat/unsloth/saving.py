"""What Unsloth's models save, written by our exports: each is read back and compared with what was trained."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from lowrank.checkpoints.peft_layout import write_adapter
from lowrank.errors import ConfigError, NotTheSameError, did_you_mean, raise_all
from lowrank.export.gguf.convert import PLAIN_TYPES
from lowrank.export.gguf.mixes import BASES
from lowrank.export.hub import check_push, push_folder
from lowrank.export.targets.gguf import Config as Gguf
from lowrank.export.targets.merged import Config as Merged
from lowrank.export.targets.merged_4bit import Config as Merged4bit
from lowrank.models.loading import locate
from lowrank.take_home import Order, take_home
from lowrank.to_take_home import open_source

GGUF_TYPES = {"not_quantized": "bf16", "fast_quantized": "q8_0", "quantized": "q4_k_m"}
"""Unsloth's own words."""
_HARMLESS: Mapping[str, Any] = {
    # transformers' and PEFT's arguments that say what happens anyway
    "state_dict": None, "is_main_process": True, "safe_serialization": True, "save_function": None,
    "selected_adapters": None, "push_to_hub": False, "max_shard_size": "5GB", "temporary_location": None,
    "maximum_memory_usage": None, "variant": None, "first_conversion": None, "save_embedding_layers": "auto",
}  # fmt: skip
_SAY = logging.getLogger(__name__)


def save_lora(model: Any, folder: Path, tokenizer: Any = None, **others: Any) -> None:
    """The adapter at work, in PEFT's layout, beside whatever else is in `folder`."""
    _refuse("save_pretrained", others)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        write_adapter(Path(partial), model.on_disk(), model.description)
        for path in Path(partial).iterdir():
            os.replace(path, folder / path.name)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_merged(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    verify: bool = True,
    **others: Any,
) -> None:
    """`save_method`: merged_16bit, merged_4bit (bitsandbytes' nf4) or lora.

    `folder` must be empty or not exist. `verify` reads what was written back and compares it with base + adapter:
    NotTheSameError if it is another model, a warning where 4 bits cost more than they should. ConfigError for anything
    else that is asked.
    """
    if save_method == "lora":
        save_lora(model, folder, tokenizer, **others)
        return
    shard = others.get("max_shard_size", "5GB")
    _refuse("save_pretrained_merged", {**others, "max_shard_size": "5GB"})
    if save_method == "merged_16bit":
        _write(model, folder, tokenizer, Merged(dtype=_sixteen_bits(model), max_shard_size=shard), verify)
    elif save_method in ("merged_4bit", "merged_4bit_forced"):
        _write(model, folder, tokenizer, Merged4bit(calibrate=False, max_shard_size=shard), verify)
    else:
        raise ConfigError(f"save_method={save_method!r}: expected merged_16bit, merged_4bit or lora")


def save_gguf(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    quantization_method: str | list[str] | tuple[str, ...] = "fast_quantized",
    verify: bool = True,
    **others: Any,
) -> None:
    """`quantization_method`: llama.cpp's types (q8_0, q4_k_m, f16 ...), one or several, or Unsloth's words for some.

    With `verify`, a warning says where a file differs from base + adapter more than its type should cost.
    """
    _refuse("save_pretrained_gguf", others)
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    types = tuple(GGUF_TYPES.get(name.lower(), name.lower()) for name in asked)
    known = {*PLAIN_TYPES, *(name.lower() for name in BASES), *GGUF_TYPES}
    for name in types:
        if name not in known:
            raise ConfigError(f"quantization_method={name!r}: no type of GGUF files{did_you_mean(name, known)}")
    _write(model, folder, tokenizer, Gguf(types=types), verify)


def push(save: Callable[..., None], model: Any, repo_id: str, **others: Any) -> dict[str, Any]:
    """Save to a folder of ours, upload it, forget it. The token comes from the environment (HF_TOKEN)."""
    if others.pop("token", None):
        raise ConfigError("token: set HF_TOKEN in the environment instead, so that it is in no notebook")
    private = others.pop("private", True)
    dry_run = others.pop("dry_run", False)
    check_push(repo_id, ["unsloth"], dry_run=dry_run)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / repo_id.rpartition("/")[2]
        save(model, written, **others)
        return push_folder(written, repo_id, dry_run=dry_run, private=True if private is None else private)


def _write(model: Any, folder: Path, tokenizer: Any, target: Any, verify: bool) -> None:
    tokenizer = tokenizer if tokenizer is not None else model.base.tokenizer
    with tempfile.TemporaryDirectory() as beside:
        adapter = Path(beside) / folder.name
        save_lora(model, adapter)
        if isinstance(tokenizer.chat_template, str):
            (adapter / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        source = open_source(str(adapter), notify=_SAY.info)
        told = take_home(source, [Order(target, folder)], verify=verify, notify=_SAY.info)
    own = told["targets"][target.type]
    found = [f"{each['name']}: {word}" for each in own["comparisons"] for word in each["problems"]]
    heading = f"{folder} is written and kept, and differs from what was trained more than was to be expected"
    if isinstance(target, (Gguf, Merged4bit)):  # how much few bits cost depends on the model
        for problem in found:
            _SAY.warning("%s: %s", heading, problem)
    else:
        raise_all(NotTheSameError, heading, found)


def _sixteen_bits(model: Any) -> Literal["auto", "bfloat16"]:
    """What the base's files have, if that is a 16-bit type."""
    path = Path(locate(model.settings.path)) / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = str(fields.get("dtype", fields.get("torch_dtype", "")))
    return "auto" if said in ("bfloat16", "float16") or not path.is_file() else "bfloat16"


def _refuse(what: str, given: Mapping[str, Any]) -> None:
    problems = [name for name, value in given.items() if name not in _HARMLESS or value != _HARMLESS[name]]
    if problems:
        shown = ", ".join(f"{name}={given[name]!r}" for name in problems)
        raise ConfigError(f"{what} cannot honour {shown}; leave it out")
