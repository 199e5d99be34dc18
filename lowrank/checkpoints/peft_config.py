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
from lowrank.adapters.prompts import PromptSettings
from lowrank.adapters.targets import by_pattern, fused_parameters, holds_layers, matches
from lowrank.adapters.variants import AdapterConfig
from lowrank.checkpoints import adalora_files
from lowrank.errors import ModelError
from lowrank.settings import configs_in

Value = TypeVar("Value", int, float)
Targets = Mapping[str, tuple[int, float]]
"""Rank and alpha of every adapted module, by full name."""

VARIANTS = configs_in(variants.__name__)

READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "rank_pattern", "alpha_pattern", "modules_to_save",
    "init_lora_weights", "ensure_weight_tying", "target_parameters", "trainable_token_indices",
}  # fmt: skip
"""Fields of every kind of adapter; a variant's `peft_names` and `peft_fields` add its own."""
SAID_BY_TENSORS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
WITHOUT_MEANING = {
    # where the file comes from, and how the adapter once began
    "auto_mapping", "peft_version", "inference_mode", "runtime_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "save_projection",
    # matter in training only, where lowrank has none of them, or for convolutions
    "rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights", "init_ia3_weights", "use_effective_conv2d",
    "eps", "mini_r",
}  # fmt: skip
OF_PROMPTS = {
    "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "prefix_projection", "encoder_hidden_size",
    "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type",
}  # fmt: skip
"""Fields of prompts that say what the table's shape says, or how it came to be."""
SAVED_AS = {"P_TUNING": "PROMPT_TUNING"}
"""Kinds whose files hold what another kind's do, and are read as such."""
WITH_PATTERNS = ("LORA", "LOHA", "LOKR")
"""Kinds of adapters whose modules may differ in rank and alpha."""
WITHOUT_CONV1D = ("LOHA", "LOKR", "OFT", "MISS")
"""Kinds that PEFT does not put on layers with a transposed weight."""
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
    expert_parameters: tuple[str, ...] = ()
    """Fused weights of experts by full name, in the model's order."""


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
    target_parameters: tuple[str, ...]
    """Fused weights of experts, by the ends of their names."""
    token_ids: tuple[int, ...]
    """Tokens with rows of their own."""
    base_name: str | None
    revision: str | None

    def target(self, name: str) -> tuple[int, float]:
        """Rank and alpha of a module, by PEFT's rules; those of a variant without them mean nothing."""
        rank, alpha = self.general
        return by_pattern(self.rank_pattern, name, rank), float(by_pattern(self.alpha_pattern, name, alpha))

    @property
    def general(self) -> tuple[int, float]:
        """Rank and alpha where no pattern says otherwise."""
        rank = self.settings.get("rank", self.variant.model_fields["rank"].default)
        return rank, self.settings.get("alpha", 2.0 * rank)


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
    return BaseDescription(name, revision, tuple(names), frozenset(transposed), tuple(fused_parameters(model)))


def peft_trouble(base: BaseDescription, targets: Collection[str], peft_type: str = "LORA") -> str | None:
    """Why PEFT would not load an adapter with these targets as it was trained, in words for the user; None: it would.

    With transformers 5, PEFT (seen in 0.21) takes any target with the name an expert's layer had in transformers 4
    for the fused experts, be it the full name of a dense layer, and leaves that layer without its adapter.
    """
    transposed = sorted({name.rpartition(".")[2] for name in targets if name in base.transposed})
    if transposed and peft_type in WITHOUT_CONV1D:
        return f"PEFT has no {peft_type} for layers like {', '.join(transposed)} (Conv1D); lowrank loads this adapter"
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
    if config.peft_fields is None:
        raise ModelError(
            f"adapter.type {config.type!r} has no form in PEFT's layout and cannot be saved; "
            "its `Config` says it in `peft_fields`"
        )
    where = {
        "peft_type": config.peft_type,
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
    if config.peft_type in WITH_PATTERNS:
        ranks = {name: rank for name, (rank, _) in targets.items()}
        alphas = {name: _whole(value) for name, (_, value) in targets.items()}
        fields["rank_pattern"] = as_pattern(ranks, config.rank)
        fields["alpha_pattern"] = as_pattern(alphas, _whole(_alpha(config)))
    if config.peft_type not in WITHOUT_CONV1D:
        fields["fan_in_fan_out"] = any(name in base.transposed for name in targets)
    if config.peft_type == "LORA":
        fields |= {"bias": "none", "init_lora_weights": True, **_variant_fields()}
    return {**fields, **config.peft_fields}


def _own_fields(config: AdapterConfig, targets: Targets, outside: Sequence[str]) -> dict[str, Any]:
    """The settings that PEFT has too, under its names."""
    fields = {peft_name: getattr(config, name) for name, peft_name in config.peft_names.items()}
    if "alpha" in config.peft_names:
        fields[config.peft_names["alpha"]] = _whole(_alpha(config))
    if "feedforward_modules" in fields:
        inner = {name: None for name in targets if matches(name, fields["feedforward_modules"])}
        fields["feedforward_modules"] = names_for(inner, outside, _is_named)
        if not set(fields["feedforward_modules"]) <= set(names_for(targets, outside, _is_named)):
            fields["feedforward_modules"] = sorted(inner)
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


def from_peft(fields: Mapping[str, Any], problems: list[str]) -> Description | None:
    """Read adapter_config.json; adds all that cannot be honoured to `problems`. None: it cannot be made sense of."""
    before = len(problems)
    kind = fields.get("peft_type")
    fields = {**fields, "peft_type": SAVED_AS.get(str(kind), kind)}
    problems += _wrong_kind(fields)
    if len(problems) > before:
        return None
    variant = _variant(fields)
    if variant is None:
        problems.append(f"lowrank has no variant with {_variant_said(fields)} together")
        return None
    problems += _unsupported(fields, variant)
    settings: dict[str, Any] = {}
    if fields["peft_type"] in WITH_PATTERNS:  # PEFT's defaults
        settings = {"rank": 8, "alpha": 8}
    for name, peft_name in variant.peft_names.items():
        if fields.get(peft_name) is not None:
            settings[name] = fields[peft_name]
    try:
        variant(**settings)
    except ValidationError as error:
        names = variant.peft_names
        problems += [
            f"{names.get(str(each['loc'][0]), each['loc'][0]) if each['loc'] else 'settings'}: {each['msg']}, "
            f"got {each['input']!r}"
            for each in error.errors()
        ]
    patterns = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns.append(fields.get(key) or {})
        problems += [f"{key}: {name!r} has {value!r}, not a number above 0" for name, value in patterns[-1].items()
                     if not isinstance(value, (int, float)) or value <= 0]  # fmt: skip
        problems += [f"{key}: {name!r} is no regular expression" for name in patterns[-1] if not _compiles(name)]
    token_ids = _token_ids(fields.get("trainable_token_indices"), problems)
    if len(problems) > before:
        return None
    return Description(
        variant=variant,
        settings=settings,
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
        tied=bool(fields.get("ensure_weight_tying")),
        target_parameters=tuple(fields.get("target_parameters") or ()),
        token_ids=token_ids,
        base_name=fields.get("base_model_name_or_path"),
        revision=fields.get("revision"),
    )


def _token_ids(said: Any, problems: list[str]) -> tuple[int, ...]:
    """A list, or one for each layer that has rows."""
    lists = list(said.values()) if isinstance(said, dict) else [said or []]
    if any(ids != lists[0] for ids in lists):
        problems.append(f"trainable_token_indices: {said!r}; lowrank reads those of the same tokens in all layers")
    return tuple(lists[0] if lists else ())


def _wrong_kind(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    known = sorted({*(config.peft_type for config in _saved_by_peft()), *SAVED_AS, adalora_files.KIND})
    if fields.get("peft_type") not in known:
        problems.append(f"peft_type is {fields.get('peft_type')!r}; lowrank reads {', '.join(known)}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {fields['task_type']!r}; lowrank reads CAUSAL_LM")
    return problems


def _unsupported(fields: Mapping[str, Any], variant: type[Any]) -> list[str]:
    """One line for every field that changes what the adapter computes in a way lowrank does not know."""
    problems = []
    known = READ | SAID_BY_TENSORS | WITHOUT_MEANING | set(variant.peft_names.values())
    if variant.peft_type == "LORA":
        known |= set(_variant_fields())
    if issubclass(variant, PromptSettings):
        known |= OF_PROMPTS
    for name in sorted(set(fields) - known):
        value = fields[name]
        if value and (name, value) != ("bias", "none"):
            problems.append(f"{name}: {value!r} is not supported; lowrank reads adapters that leave it out")
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in HARMLESS_STARTS:
        problems.append(
            f"init_lora_weights: {start!r} altered the base it was trained on; convert the adapter in PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    return problems


def _saved_by_peft() -> list[type[Any]]:
    return [config for config in VARIANTS.values() if getattr(config, "peft_fields", None) is not None]


def _variant_fields() -> dict[str, Any]:
    """Every field that tells variants of LoRA apart, at PEFT's default, false."""
    return {name: False for config in _saved_by_peft() if config.peft_type == "LORA" for name in config.peft_fields}


def _variant_said(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields.get(name) or default for name, default in _variant_fields().items()}


def _variant(fields: Mapping[str, Any]) -> type[Any] | None:
    for config in _saved_by_peft():
        if config.peft_type != fields["peft_type"]:
            continue
        if config.peft_type != "LORA" or {**_variant_fields(), **config.peft_fields} == _variant_said(fields):
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
