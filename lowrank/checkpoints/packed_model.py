"""A packed base on disk, as transformers and bitsandbytes read it; we read it too, without packing again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.checkpoints.atomic import current, new_folder
from lowrank.errors import ConfigError, ModelError, OutputError
from lowrank.kernels.four_bit import quantise_way
from lowrank.kernels.host_memory import keep_freed_memory
from lowrank.models.checkpoint_files import checkpoint_files
from lowrank.models.config import Config
from lowrank.models.loading import load, locate
from lowrank.models.prequantised.bnb import as_config, as_tensors
from lowrank.models.quantised_copies import remember_copy
from lowrank.models.quiet import quiet_transformers
from lowrank.models.storages.packed import PackedLinear
from lowrank.models.streaming import kept_dense

WRITABLE = ("nf4", "fp4", "int8")
"""Storages that bitsandbytes has a format for."""


def save_packed(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model whose linears are nf4, fp4 or int8 to `folder`, whole or not at all.

    ModelError if nothing in it is packed, or something in a way that bitsandbytes has no format for.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise ModelError(f"{type(model).__name__} has no quantised layers to write")
    state = dict(model.state_dict())
    for name, module in packed.items():
        inner = f"{name}."
        for key in [key for key in state if key.startswith(inner) and key != f"{inner}bias"]:
            del state[key]
        state.update({inner + suffix: tensor for suffix, tensor in as_tensors(module).items()})
    others = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    first = next(iter(packed.values()))
    with new_folder(Path(folder)) as partial, quiet_transformers():
        model.config.quantization_config = as_config(packed, others, first.dtype)
        try:
            model.save_pretrained(partial, state_dict=state)
        finally:
            del model.config.quantization_config
        tokenizer.save_pretrained(partial)


def quantize_model(config: Config, folder: Path, notify: Callable[[str], None] = print) -> dict[str, Any]:
    """Write a quantised copy of `config.path` to `folder`, which must not exist; what was written, in numbers.

    Runs that would quantise the same checkpoint the same way read the copy from now on.

    Raises ConfigError for a storage that bitsandbytes has no format for, OutputError, ModelError.
    """
    if config.storage.type not in WRITABLE:
        raise ConfigError(
            f"storage {config.storage.type} has no file format of its own: {', '.join(WRITABLE)} can be written "
            "(bitsandbytes' format). In a run, model.storage takes any storage and quantises while it loads"
        )
    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with -o, or remove it")
    keep_freed_memory()
    base = load(config, notify=notify)
    save_packed(folder, base.model, base.tokenizer)
    remember_copy(locate(config.path), config.revision, config.storage, base.dtype, folder)
    layers = [module for module in base.model.modules() if isinstance(module, PackedLinear)]
    packed = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in layer.state_dict().values())
    biases = sum(layer.bias.numel() * layer.bias.element_size() for layer in layers if layer.bias is not None)
    original = checkpoint_files(locate(config.path), config.revision)
    return {
        "folder": str(folder),
        "storage": config.storage.type,
        "layers": len(layers),
        "bits_per_parameter": 8 * (packed - biases) / sum(each.in_features * each.out_features for each in layers),
        "quantised_by": quantise_way(base.device),
        "bytes": sum(file.stat().st_size for file in current(folder).glob("*.safetensors")),
        "original_bytes": sum(Path(file).stat().st_size for file in original),
        "kept_dense_bytes": kept_dense(base.model),
    }
