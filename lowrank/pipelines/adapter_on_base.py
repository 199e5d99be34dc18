"""Checks an adapter against the base's files before the base is loaded: weights of the base that the adapter
contains."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import huggingface_hub
import torch

import lowrank.models.loading.pretrained as loading
from lowrank.checkpoints.base_tensors import on_base, refuse_other_shapes
from lowrank.checkpoints.language_names import on_composite
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import LowrankError, ModelError
from lowrank.export.merge.tensor_names import Names
from lowrank.export.merge.weights import TensorSource, Weights
from lowrank.hub_reach import hub_or_cache
from lowrank.models.config import ModelConfig
from lowrank.models.layers import Parts
from lowrank.models.loading.model_class import is_composite, model_class
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.planning.simulation import read_config

_BASE_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*"]


def on_base_of(adapter: AdapterOnDisk, model: ModelConfig) -> AdapterOnDisk:
    """Return the adapter with names and tensors as the base in `model`'s files has them (base_tensors.py,
    language_names.py)."""
    adapter = _on_composite(adapter, model)
    if not adapter.base_tensors and not adapter.copies:
        return adapter
    stored, tied = _stored_by_name(model)

    def weight_of(name: str) -> torch.Tensor | None:
        found = stored(name)
        return None if found is None else found.read()

    return on_base(adapter, weight_of, tied)


def _on_composite(adapter: AdapterOnDisk, model: ModelConfig) -> AdapterOnDisk:
    try:
        config = read_config(model)
    except ModelError:  # loading the base reports it
        return adapter
    if not is_composite(config):
        return adapter
    with quiet_transformers(), torch.device("meta"):
        return on_composite(adapter, model_class(config).from_config(config, trust_remote_code=model.runs_own_code))


def targets_beside(adapter: AdapterOnDisk, model: ModelConfig) -> list[str]:
    """Return the full names of layers outside the language model (towers, projectors) that an adapter is on."""
    config = read_config(model)
    if not is_composite(config):
        return []
    with quiet_transformers(), torch.device("meta"):
        parts = Parts(model_class(config).from_config(config, trust_remote_code=model.runs_own_code))
    return [name for name in adapter.targets if parts.is_outside(name)]


def refuse_before_loading(adapter: AdapterOnDisk, model: ModelConfig) -> None:
    """Compare the shapes of base weights in an adapter's file with those in `model`'s files, by their headers.
    ModelError where they differ."""
    if not adapter.base_tensors and not adapter.copies:
        return
    stored, _ = _stored_by_name(model)

    def shape_of(name: str) -> tuple[int, ...] | None:
        found = stored(name)
        return None if found is None else tuple(found.shape)

    refuse_other_shapes(adapter, shape_of)


def _stored_by_name(model: ModelConfig) -> tuple[Callable[[str], TensorSource | None], Collection[str]]:
    """Return a lookup of the base's stored tensors by the model's names, and the names of tied tensors."""
    loading.check_model(model)
    folder = on_disk(model)
    weights = Weights(folder)
    names = Names(folder, weights, trust_remote_code=model.runs_own_code)

    def stored(name: str) -> TensorSource | None:
        try:
            return weights[names.origin(name)]
        except (StopIteration, KeyError):
            return None

    return stored, names.tied


def on_disk(model: ModelConfig) -> Path:
    """Return the folder of the base, for a hub model in the hub's cache. ModelError if there is none."""
    folder = Path(loading.locate(model.path))
    if folder.is_dir():
        return folder
    try:
        with hub_or_cache(model.path, model.revision):
            return Path(
                huggingface_hub.snapshot_download(model.path, revision=model.revision, allow_patterns=_BASE_FILES)
            )
    except LowrankError:
        raise
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        raise ModelError(
            f"{model.path}: no such folder, and it could not be downloaded from the hub ({error}); name the "
            "folder of the base"
        ) from error
