"""One adapter in its slot, and the form that it has in files: tensors by PEFT's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.linear import LayerAdapter
from lowrank.adapters.targets import by_pattern
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.token_rows import token_ids
from lowrank.adapters.variants import AdapterConfig
from lowrank.adapters.variants.base import FileForm, SharedTensors, SiteSetup, Variant, saved_tensors
from lowrank.errors import ModelError, raise_all
from lowrank.models.base import Base


@dataclass
class Slot:
    """One adapter: its settings, what it reaches and its trainable tensors by PEFT's names."""

    config: AdapterConfig
    variant: Variant
    ranks: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Rank and alpha of each adapted module."""
    layers: dict[str, LayerAdapter] = field(default_factory=dict)
    experts: dict[str, LayerAdapter] = field(default_factory=dict)
    """By the full name of the fused parameter."""
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    """What is trained. Frozen tensors are with their layers."""
    copies: tuple[str, ...] = ()
    unmatched_note: str | None = None
    """Which of its `target_modules` match nothing that can be adapted, for people; None: all do."""
    adapts_tower: bool = False
    """Some of its layers are in a tower or a projector."""


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as files have it: settings, tensors by PEFT's names, rank and alpha of each module."""

    config: AdapterConfig
    tensors: dict[str, torch.Tensor]
    ranks: dict[str, tuple[int, float]]


def saved_form(slot: Slot, base: Base) -> SavedAdapter:
    """An adapter in the form in which PEFT knows it, without copies where the tensors are its own."""
    config: Any = slot.config.as_saved()
    tensors: dict[str, torch.Tensor] = {}
    ranks = {name: layer_rank(slot.variant, name, config) for name in slot.ranks}
    for name, layer in slot.layers.items():
        own = saved_tensors(slot.variant, layer.masters)
        if isinstance(slot.variant, FileForm):
            ranks[name] = slot.variant.target_in_files(layer.scale, own) or ranks[name]
        tensors |= {f"{name}.{config.peft.name_in_files(key)}": tensor.detach() for key, tensor in own.items()}
    of_layers = _names_of_layers(slot)
    tensors |= {name: value.detach() for name, value in slot.parameters.items() if name not in of_layers}
    if isinstance(slot.variant, SharedTensors) and slot.variant.saves_shared:
        tensors |= slot.variant.shared
    by_full_name: dict[str, Any] = {"modules_to_save": slot.copies, "target_parameters": tuple(slot.experts)}
    if config.trainable_token_indices:
        by_full_name["trainable_token_indices"] = token_ids(base, slot.config.trainable_token_indices)
    return SavedAdapter(config.model_copy(update=by_full_name), tensors, ranks)


def file_form_problems(slot: Slot) -> list[str]:
    """Which of the tensors that an adapter's files would have are not as its `peft` declares them, so that nothing
    could read them. Layers are alike, so one is looked at."""
    layer = next(iter(slot.layers.values()), None)
    if layer is None:
        return []
    config = slot.config.as_saved()
    own = saved_tensors(slot.variant, layer.masters)
    groups = [{tensor.name for tensor in group} for group in config.peft.tensors]
    unknown = sorted(own.keys() - {tensor.name for tensor in config.peft.all_tensors})
    missing = sorted({name for group in groups if group & own.keys() for name in group - own.keys()})
    place = f"{type(config).__name__}.peft ({config.peft.type})"
    problems = [f"{', '.join(unknown)}: {place} declares no such tensor in files"] if unknown else []
    problems += [f"{', '.join(missing)}: {place} declares it, and the variant saves none"] if missing else []
    return problems


def load_tensors(slot: Slot, saved: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy `tensors`, in the form of `saved_form`, into a slot; `saved` is its own now.

    ModelError lists every name that is missing or unknown and every wrong shape.
    """
    own = {name: value for name, value in saved.items() if name not in shared_tensors(slot.variant)}
    rest, problems = _check_shared(slot.variant, tensors)
    # Rows of the embedding alone, as PEFT may save them: the head's stay as they began.
    rest = {**{name: own[name] for name in own if name.endswith(TOKEN_ROWS) and _has_rows(rest)}, **rest}
    problems += [f"{name}: missing" for name in own if name not in rest]
    problems += [f"{name}: this adapter has no such tensor" for name in rest if name not in own]
    problems += [
        f"{name}: shape {tuple(rest[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in rest and rest[name].shape != own[name].shape
    ]
    raise_all(ModelError, "the tensors do not fit the adapter", problems)
    with torch.no_grad():
        _take_shared(slot.variant, tensors)
        name_in_files = slot.config.as_saved().peft.name_in_files
        for name, layer in slot.layers.items():
            given = {key: rest[f"{name}.{name_in_files(key)}"] for key in saved_tensors(slot.variant, layer.masters)}
            if isinstance(slot.variant, FileForm):
                given = slot.variant.restored(given, layer.masters)
            for key, value in given.items():
                layer.masters[key].copy_(value)
        of_layers = _names_of_layers(slot)
        for name, parameter in slot.parameters.items():
            if name not in of_layers:
                parameter.copy_(rest[name])


def rank_by(config: AdapterSettings, name: str) -> tuple[int, float]:
    """Rank and alpha of a module, by PEFT's rules."""
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    return by_pattern(config.rank_pattern, name, config.rank), by_pattern(config.alpha_pattern, name, alpha)


def layer_rank(variant: Variant, name: str, config: AdapterSettings) -> tuple[int, float]:
    """Rank and alpha of a module: by the settings, or what the variant found better."""
    rank, alpha = rank_by(config, name)
    return variant.layer_rank(name, rank, alpha) if isinstance(variant, SiteSetup) else (rank, alpha)


def shared_tensors(variant: Variant) -> Mapping[str, torch.Tensor]:
    """The tensors that its layers hold views of."""
    return variant.shared if isinstance(variant, SharedTensors) else {}


def _names_of_layers(slot: Slot) -> set[str]:
    """Names of the trained tensors of linear layers; the others are saved as they are."""
    name_in_files = slot.config.peft.name_in_files
    return {f"{name}.{name_in_files(key)}" for name, layer in slot.layers.items() for key in layer.masters}


def _has_rows(tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(name.endswith(TOKEN_ROWS) for name in tensors)


def _check_shared(variant: Variant, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """(all but the tensors that layers share, what is wrong with those)."""
    problems = [
        f"{key}: shape {tuple(tensors[key].shape)}, expected {tuple(own.shape)} for these layers"
        for key, own in shared_tensors(variant).items()
        if key in tensors and tensors[key].shape != own.shape
    ]
    return {name: tensor for name, tensor in tensors.items() if name not in shared_tensors(variant)}, problems


def _take_shared(variant: Variant, tensors: Mapping[str, torch.Tensor]) -> None:
    """What layers share as the file has it; layers hold views of it. Other values than here are saved again."""
    if not isinstance(variant, SharedTensors):
        return
    for key, own in variant.shared.items():
        if key in tensors and not torch.equal(tensors[key].to(own), own):
            own.copy_(tensors[key])
            variant.saves_shared = True
