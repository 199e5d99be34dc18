"""adapter_config.json: PEFT's description of an adapter, written without PEFT (peft_description.py reads it).

The names of targets are chosen so that PEFT matches exactly the modules that have tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.config import no_file_form
from lowrank.adapters.peft_kind import LORA, PeftKind
from lowrank.adapters.prompts import PromptSettings
from lowrank.adapters.targets import by_pattern, fused_parameters, holds_layers, matches
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints.peft_description import distinguishing_fields, whole
from lowrank.errors import ModelError
from lowrank.media.processor import PROCESSOR_FILES
from lowrank.models.layers import Parts
from lowrank.models.loading.model_class import is_composite, model_class

Value = TypeVar("Value", int, float)
Targets = Mapping[str, tuple[int, float]]
"""Rank and alpha of every adapted module, by full name."""

OLD_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class BaseDescription:
    """What adapter files say about, or need to know of, the base they belong to."""

    name: str
    """A hub name or a folder."""
    revision: str | None = None
    module_names: tuple[str, ...] = ()
    """Every module of the model; without them targets are written by full name."""
    transposed: frozenset[str] = frozenset()
    """Those that keep their weight as (D, O): GPT-2's Conv1D."""
    expert_parameters: tuple[str, ...] = ()
    """Fused weights of experts by full name, in the model's order."""
    auto_class: str = "AutoModelForCausalLM"
    """transformers' class that loads it."""
    tower_modules: frozenset[str] = frozenset()
    """Modules of its towers and projectors, where it is more than a language model."""
    supports_images: bool = False
    """It takes pictures."""


def describe_base(model: nn.Module, name: str, revision: str | None = None) -> BaseDescription:
    """Describe a model by the names it had before lowrank wrapped any of its layers."""
    names, transposed, inside = [], [], None
    for module_name, module in model.named_modules():
        if not module_name or (inside is not None and module_name.startswith(inside)):
            continue
        inside = f"{module_name}." if holds_layers(module) else None
        names.append(module_name)
        if isinstance(module, Conv1D) or getattr(getattr(module, "base", None), "transposed", False):
            transposed.append(module_name)
    config = getattr(model, "config", None)
    auto_class = BaseDescription.auto_class if config is None else model_class(config).__name__
    experts = tuple(fused_parameters(model))
    tower_modules, supports_images = frozenset[str](), False
    if config is not None and is_composite(config):
        parts = Parts(model)
        supports_images = getattr(config, "vision_config", None) is not None and _has_processor(name)
        tower_modules = frozenset(filter(parts.is_outside, names))
    return BaseDescription(
        name, revision, tuple(names), frozenset(transposed), experts, auto_class, tower_modules, supports_images
    )


def _has_processor(base: str) -> bool:
    """Whether a model of this name comes with the files of its processor; of the hub's it is taken for granted."""
    return not os.path.isdir(base) or any(os.path.exists(os.path.join(base, file)) for file in PROCESSOR_FILES)


def left_out_by_vllm(base: BaseDescription, targets: Collection[str]) -> str | None:
    """What vLLM makes of an adapter with these targets on a base with towers, in words for the user; None: the base
    has none."""
    if not base.tower_modules:
        return None
    number = len(base.tower_modules & set(targets))
    if not number:
        return "vLLM takes adapters on the language model of such a base, which is where all of this one is"
    return (
        f"By default vLLM takes adapters on the language model of such a base alone: it leaves {number} of this one's "
        f"{len(targets)} layers out, those of tower and projector, and warns at most. Serve the merged model there "
        "(`lowrank export ... --to merged`)"
    )


def peft_incompatibility(base: BaseDescription, targets: Collection[str], kind: PeftKind = LORA) -> str | None:
    """Why PEFT would not load an adapter with these targets as it was trained, in words for the user; None: it would.

    With transformers 5, PEFT (seen in 0.21) takes any target with the name an expert's layer had in transformers 4
    for the fused experts, be it the full name of a dense layer, and leaves that layer without its adapter.
    """
    transposed = sorted({name.rpartition(".")[2] for name in targets if name in base.transposed})
    if transposed and not kind.on_conv1d:
        return f"PEFT has no {kind.type} for layers like {', '.join(transposed)} (Conv1D); lowrank loads this adapter"
    taken = sorted({name.rpartition(".")[2] for name in targets} & OLD_EXPERT_NAMES)
    if not base.expert_parameters or not taken:
        return None
    return (
        f"PEFT takes the targets {', '.join(taken)} of a mixture for its experts, so it may load this adapter "
        "without those layers; lowrank loads it as trained. For use with PEFT leave them out by "
        f"adapter.exclude_modules: [{', '.join(taken)}]"
    )


def to_peft(
    config: AdapterConfig, targets: Targets, copies: Sequence[str], base: BaseDescription, task_type: str = "CAUSAL_LM"
) -> dict[str, Any]:
    """The fields of adapter_config.json. `copies`: full names of the modules trained whole."""
    if config.peft_fields is None:  # a run's settings are refused before (config/checks.py)
        raise ModelError(f"adapter.type: {no_file_form(config)}")
    where = {
        "peft_type": config.peft.type,
        "task_type": task_type,
        "base_model_name_or_path": os.path.abspath(base.name) if os.path.isdir(base.name) else base.name,
        "revision": base.revision,
        "inference_mode": True,
    }
    if isinstance(config, PromptSettings):  # what else PEFT wants to know it asks the model
        return {**where, "num_virtual_tokens": config.num_virtual_tokens, **(config.peft_fields or {})}
    parameters = [name for name in targets if name in config.target_parameters]
    modules = {name: target for name, target in targets.items() if name not in parameters}
    outside = [name for name in base.module_names if not any(f"{name}.".startswith(f"{copy}.") for copy in copies)]
    fields = {
        **where,
        "target_modules": names_for(modules, outside, _is_named),
        # PEFT compares these endings without regard to dots
        "modules_to_save": names_for(copies, base.module_names, str.endswith) or None,
        **_own_fields(config, modules, outside),
    }
    if parameters:
        fields["target_parameters"] = names_for_parameters(parameters, base.expert_parameters)
    if config.peft.has_patterns:
        ranks = {name: rank for name, (rank, _) in targets.items()}
        fields["rank_pattern"] = as_pattern(ranks, config.rank)
    if config.peft.has_patterns and "alpha" in config.peft.names:
        alphas = {name: whole(value) for name, (_, value) in targets.items()}
        fields["alpha_pattern"] = as_pattern(alphas, whole(_alpha(config)))
    if config.peft.on_conv1d:
        fields["fan_in_fan_out"] = any(name in base.transposed for name in targets)
    return {**fields, **config.peft.fields, **distinguishing_fields(config.peft.type), **config.peft_fields}


def _own_fields(config: AdapterConfig, targets: Targets, outside: Sequence[str]) -> dict[str, Any]:
    """The settings that PEFT has too, under its names."""
    fields = {peft_name: getattr(config, name) for name, peft_name in config.peft.names.items()}
    if "alpha" in config.peft.names:
        fields[config.peft.names["alpha"]] = whole(_alpha(config))
    for name in config.peft.module_lists:
        inner = {target: None for target in targets if matches(target, fields[name])}
        fields[name] = names_for(inner, outside, _is_named)
        if not set(fields[name]) <= set(names_for(targets, outside, _is_named)):
            fields[name] = sorted(inner)
    return fields


def _alpha(config: AdapterConfig) -> float:
    return config.alpha if config.alpha is not None else 2.0 * config.rank


def _is_named(name: str, item: str) -> bool:
    return matches(name, (item,))


def names_for(wanted: Collection[str], module_names: Sequence[str], is_match: Callable[[str, str], bool]) -> list[str]:
    """The last parts of the wanted names where they match nothing else in the model, else full names; sorted."""
    all_wanted, by_last = set(wanted), {}
    for name in wanted:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    chosen: set[str] = set()
    for last, names in by_last.items():
        unique = module_names and all(other in all_wanted for other in module_names if is_match(other, last))
        chosen.update([last] if unique else names)
    excess = [
        other for other in module_names if other not in all_wanted and any(is_match(other, item) for item in chosen)
    ]
    assert not excess, f"PEFT would also match {excess}"
    return sorted(chosen)


def names_for_parameters(wanted: Collection[str], fused: Sequence[str]) -> list[str]:
    """The last two parts of the wanted names where no other parameter ends like that, else full names; sorted."""
    chosen = set()
    for name in wanted:
        last = ".".join(name.split(".")[-2:])
        unique = fused and all(other in wanted for other in fused if other.endswith(f".{last}"))
        chosen.add(last if unique else name)
    return sorted(chosen)


def as_pattern(value_of: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """The shortest rank_pattern or alpha_pattern that gives every module its value."""
    by_last: dict[str, list[str]] = {}
    for name in value_of:
        by_last.setdefault(name.rpartition(".")[2], []).append(name)
    pattern: dict[str, Value] = {}
    for last, names in by_last.items():
        if len({value_of[name] for name in names}) == 1:
            pattern[last] = value_of[names[0]]
        else:
            pattern.update({name: value_of[name] for name in names})
    pattern = {key: value for key, value in pattern.items() if value != default}
    if any(by_pattern(pattern, name, default) != value for name, value in value_of.items()):
        # a full name that is also the ending of another one
        pattern = {f"^{re.escape(name)}": value for name, value in value_of.items() if value != default}
    return dict(sorted(pattern.items()))
