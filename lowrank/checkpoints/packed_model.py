"""A packed base on disk, as transformers and bitsandbytes read it; we read it too, without packing again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.checkpoints.atomic import current, new_folder
from lowrank.checkpoints.model_config import rewrite_config
from lowrank.errors import ConfigError, ModelError, OutputError
from lowrank.kernels.four_bit import quantize_way
from lowrank.models.config import ModelConfig
from lowrank.models.loading.checkpoint_files import checkpoint_files
from lowrank.models.loading.pretrained import load, locate
from lowrank.models.loading.quantize_on_load import kept_dense
from lowrank.models.loading.quantized_copies import remember_copy
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.prequantized.bnb import as_config, as_tensors
from lowrank.models.storages.packed import PackedLinear
from lowrank.notices import log_notice

WRITABLE = ("nf4", "fp4", "int8")
"""Storages that bitsandbytes has a format for."""


def save_packed(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model whose linears are nf4, fp4 or int8 to `folder`, whole or not at all.

    ModelError if nothing in it is packed, or something in a way that bitsandbytes has no format for.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise ModelError(f"{type(model).__name__} has no quantized layers to write")
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
            rewrite_config(partial)
        finally:
            del model.config.quantization_config
        tokenizer.save_pretrained(partial)


def quantize_model(config: ModelConfig, folder: Path, notify: Callable[[str], None] = log_notice) -> dict[str, Any]:
    """Write a quantized copy of `config.path` to `folder`, which must not exist; what was written, in numbers.

    Runs that would quantize the same checkpoint the same way read the copy from now on.

    Raises ConfigError for a storage that bitsandbytes has no format for, OutputError, ModelError.
    """
    if config.storage.type not in WRITABLE:
        raise ConfigError(
            f"storage {config.storage.type} has no file format of its own: {', '.join(WRITABLE)} can be written "
            "(bitsandbytes' format). In a run, model.storage takes any storage and quantizes while it loads"
        )
    if folder.exists():
        raise OutputError(f"{folder} exists already: name another folder with -o, or remove it")
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
        "quantized_by": quantize_way(base.device),
        "bytes": sum(file.stat().st_size for file in current(folder).glob("*.safetensors")),
        "original_bytes": sum(Path(file).stat().st_size for file in original),
        "kept_dense_bytes": kept_dense(base.model),
    }
