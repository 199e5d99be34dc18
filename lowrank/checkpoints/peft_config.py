"""adapter_config.json: PEFT's description of an adapter, written and read without PEFT.

What an adapter reaches is decided by its tensors, so on reading `target_modules`, whichever of PEFT's ways
of choosing modules made it, needs no interpretation. On writing the names are chosen so that PEFT matches
exactly the modules that have tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters import variants
from lowrank.adapters.targets import by_pattern, matches
from lowrank.adapters.variants import AdapterConfig
from lowrank.errors import ModelError
from lowrank.settings import configs_in

Value = TypeVar("Value", int, float)
Targets = Mapping[str, tuple[int, float]]
"""Rank and alpha of every adapted module, by full name."""

VARIANTS = configs_in(variants.__name__)

READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "rank_pattern",
    "alpha_pattern", "modules_to_save", "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
SAID_BY_TENSORS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
WITHOUT_MEANING = {
    # where the file comes from, and how the adapter once began
    "auto_mapping", "peft_version", "inference_mode", "runtime_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size",
}  # fmt: skip
HARMLESS_STARTS = {True, False, None, "gaussian", "eva", "orthogonal"}
"""Values of init_lora_weights that leave the base as it is; with all others the adapter fits an altered base."""

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
    fused_experts: bool = False
    """A mixture whose experts are 3-D parameters."""


@dataclass(frozen=True)
class Description:
    """What adapter_config.json says, but for the modules. `settings` are fields of the variant's `Config`."""

    variant: type[Any]
    settings: dict[str, Any]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    modules_to_save: tuple[str, ...]
    tied: bool
    """Copies of the embedding and of the head are one tensor in PEFT."""
    base_name: str | None
    revision: str | None

    def target(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a module, by PEFT's rules."""
        rank = by_pattern(self.rank_pattern, name, self.settings["rank"])
        return rank, float(by_pattern(self.alpha_pattern, name, self.settings["alpha"]))


def describe_base(model: nn.Module, name: str, revision: str | None = None) -> BaseDescription:
    """Describe a model by the names it had before lowrank wrapped any of its layers."""
    names, transposed, inside = [], [], None
    for module_name, module in model.named_modules():
        if not module_name or (inside is not None and module_name.startswith(inside)):
            continue
        inside = f"{module_name}." if getattr(module, "is_routed", False) else None
        names.append(module_name)
        if isinstance(module, Conv1D) or getattr(getattr(module, "base", None), "transposed", False):
            transposed.append(module_name)
    fused = any(parameter.ndim == 3 and "expert" in key for key, parameter in model.named_parameters())
    return BaseDescription(name, revision, tuple(names), frozenset(transposed), fused)


def peft_trouble(base: BaseDescription, targets: Collection[str]) -> str | None:
    """Why PEFT would not load an adapter with these targets as it was trained, in words for the user; None: it would.

    With transformers 5, PEFT (seen in 0.21) takes any target with the name an expert's layer had in transformers 4
    for the fused experts, be it the full name of a dense layer, and leaves that layer without its adapter.
    """
    taken = sorted({name.rpartition(".")[2] for name in targets} & OLD_EXPERT_NAMES)
    if not base.fused_experts or not taken:
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
    if config.peft_fields is None:
        raise ModelError(
            f"adapter.type {config.type!r} has no form in PEFT's layout and cannot be saved; "
            "its `Config` says it in `peft_fields`"
        )
    alpha = config.alpha if config.alpha is not None else 2.0 * config.rank
    outside = [name for name in base.module_names if not any(f"{name}.".startswith(f"{copy}.") for copy in copies)]
    ranks = {name: rank for name, (rank, _) in targets.items()}
    alphas = {name: _whole(value) for name, (_, value) in targets.items()}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": os.path.abspath(base.name) if os.path.isdir(base.name) else base.name,
        "revision": base.revision,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": config.dropout,
        "target_modules": names_for(targets, outside, lambda name, item: matches(name, (item,))),
        # PEFT compares these endings without regard to dots
        "modules_to_save": names_for(copies, base.module_names, str.endswith) or None,
        "rank_pattern": as_pattern(ranks, config.rank),
        "alpha_pattern": as_pattern(alphas, _whole(alpha)),
        "fan_in_fan_out": any(name in base.transposed for name in targets),
        "bias": "none",
        "init_lora_weights": True,
        **_variant_fields(),
        **config.peft_fields,
    }


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


def from_peft(fields: Mapping[str, Any], problems: list[str]) -> Description | None:
    """Read adapter_config.json; adds all that cannot be honoured to `problems`. None: it cannot be made sense of."""
    before = len(problems)
    problems += _wrong_kind(fields)
    if len(problems) > before:
        return None
    problems += _unsupported(fields)
    settings = {"rank": fields.get("r", 8), "alpha": fields.get("lora_alpha", 8)}
    settings["dropout"] = fields.get("lora_dropout") or 0.0
    variant = _variant(fields)
    if variant is None:
        problems.append(f"lowrank has no variant with {_variant_said(fields)} together")
        return None
    try:
        variant(**settings)
    except ValidationError as error:
        names = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
        problems += [f"{names[str(each['loc'][0])]}: {each['msg']}, got {each['input']!r}" for each in error.errors()]
    patterns = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns.append(fields.get(key) or {})
        problems += [f"{key}: {name!r} has {value!r}, not a number above 0" for name, value in patterns[-1].items()
                     if not isinstance(value, (int, float)) or value <= 0]  # fmt: skip
        problems += [f"{key}: {name!r} is no regular expression" for name in patterns[-1] if not _compiles(name)]
    if len(problems) > before:
        return None
    return Description(
        variant=variant,
        settings=settings,
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        tied=bool(fields.get("ensure_weight_tying")),
        base_name=fields.get("base_model_name_or_path"),
        revision=fields.get("revision"),
    )


def _wrong_kind(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    if fields.get("peft_type") != "LORA":
        problems.append(f"peft_type is {fields.get('peft_type')!r}; lowrank reads LORA")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {fields['task_type']!r}; lowrank reads CAUSAL_LM")
    return problems


def _unsupported(fields: Mapping[str, Any]) -> list[str]:
    """One line for every field that changes what the adapter computes in a way lowrank does not know."""
    problems = []
    known = READ | SAID_BY_TENSORS | WITHOUT_MEANING | set(_variant_fields())
    for name in sorted(set(fields) - known):
        value = fields[name]
        if name == "target_parameters" and value:
            problems.append(
                f"target_parameters: adapters on fused expert weights ({', '.join(map(str, value))}) are not "
                "supported; train one with target_modules instead"
            )
        elif value and (name, value) != ("bias", "none"):
            problems.append(f"{name}: {value!r} is not supported; lowrank reads adapters that leave it out")
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in HARMLESS_STARTS:
        problems.append(
            f"init_lora_weights: {start!r} altered the base it was trained on; convert the adapter in PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return problems


def _variant_fields() -> dict[str, Any]:
    """Every field that tells variants apart, at PEFT's default, false."""
    return {name: False for config in VARIANTS.values() for name in getattr(config, "peft_fields", None) or {}}


def _variant_said(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields.get(name) or default for name, default in _variant_fields().items()}


def _variant(fields: Mapping[str, Any]) -> type[Any] | None:
    said = _variant_said(fields)
    for config in VARIANTS.values():
        own = getattr(config, "peft_fields", None)
        if own is not None and {**_variant_fields(), **own} == said:
            return config
    return None


def _whole(value: float) -> float:
    """16.0 as 16, which PEFT declares an int."""
    return int(value) if float(value).is_integer() else value


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
