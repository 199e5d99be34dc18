"""Single weights of a checkpoint, read again from its files: what a layer was before it was quantised."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError
from lowrank.models.base import Base
from lowrank.models.loading import locate

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def original_weight(base: Base, layer: str) -> torch.Tensor:
    """The weight (O, D) of the linear layer named `layer`; only its own bytes are read.

    Raises ModelError where the checkpoint has no such tensor: under another name, fused with others, or quantised.
    """
    path = locate(base.name)
    index = _file(path, base.revision, _INDEX)
    names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index else {}
    wanted = [f"{layer}.weight", f"{layer}.weight".removeprefix(f"{base.model.base_model_prefix}.")]
    for name in wanted:
        file = _file(path, base.revision, names.get(name, _SINGLE) if index else _SINGLE)
        if file is None:
            continue
        try:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (no mapping)
                    weight = tensors.get_tensor(name)
                    inner = getattr(base.model.get_submodule(layer), "base", None)
                    return weight.t() if getattr(inner, "transposed", False) else weight
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors ({error})") from error
    raise ModelError(
        f"{base.name}: its safetensors hold no tensor {wanted[0]!r}, so the weight before quantisation is not known; "
        "give the unquantised checkpoint as model.path, or use lora"
    )


def _file(path: str, revision: str | None, name: str) -> Path | None:
    """A file of a checkpoint folder, or of a hub checkpoint that is already here."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).is_file() else None
    try:
        found = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # neither a folder nor a hub name
        return None
    return Path(found) if found else None
