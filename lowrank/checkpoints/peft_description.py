"""What an adapter_config.json says, read without PEFT: checked, and with the variant of ours that it is.

What an adapter reaches is decided by its tensors, so `target_modules`, whichever of PEFT's ways of choosing modules
made it, needs no interpretation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from lowrank.adapters import variants
from lowrank.adapters.config import AdapterSettings
from lowrank.adapters.targets import by_pattern
from lowrank.setting_problems import error_lines
from lowrank.settings import configs_in, loaded_third_parties

VARIANTS = configs_in(variants.__name__)
READ = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "rank_pattern", "alpha_pattern", "modules_to_save",
    "init_lora_weights", "ensure_weight_tying", "target_parameters", "trainable_token_indices",
}  # fmt: skip
"""Fields of every kind of adapter; a variant's `peft` and `peft_fields` add its own."""
FROM_TENSORS = {
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
}  # fmt: skip
WITHOUT_MEANING = {"auto_mapping", "peft_version", "inference_mode", "runtime_config"}
"""Where the file comes from."""
HARMLESS_STARTS = {True, False, None, "gaussian", "eva", "orthogonal"}
"""Values of init_lora_weights that leave the base as it is; with all others the adapter fits an altered base."""
_LONGEST_PATTERN = 1000
_LARGEST_NUMBER = 1 << 20
"""Of ranks and alphas; above the hidden size of any model."""


@dataclass(frozen=True)
class Description:
    """What adapter_config.json says, but for the modules. `settings` are fields of the variant's settings class."""

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


def from_peft(fields: Mapping[str, Any], problems: list[str]) -> Description | None:
    """Read adapter_config.json; adds all that cannot be honored to `problems`. None: it cannot be made sense of."""
    before = len(problems)
    problems += _wrong_kind(fields) + _wrong_values(fields)
    if len(problems) > before:
        return None
    variant = _variant(fields)
    if variant is None:
        problems.append(f"lowrank has no variant with {_declared_variant(fields)} together")
        return None
    problems += _unsupported(fields, variant)
    settings: dict[str, Any] = {}
    if variant.peft.has_patterns:  # PEFT's defaults
        settings = {"rank": 8, "alpha": 8}
    for name, peft_name in variant.peft.names.items():
        if fields.get(peft_name) is not None:
            settings[name] = fields[peft_name]
    try:
        variant.model_validate(settings)
    except ValidationError as error:
        for line in error_lines(error, settings, variant):
            name, colon, problem = line.partition(":")
            problems.append(f"{variant.peft.names.get(name, name)}{colon}{problem}")
    patterns = []
    for key in ("rank_pattern", "alpha_pattern"):
        patterns.append(fields.get(key) or {})
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


def _token_ids(described: Any, problems: list[str]) -> tuple[int, ...]:
    """A list, or one for each layer that has rows."""
    lists = list(described.values()) if isinstance(described, dict) else [described or []]
    if any(ids != lists[0] for ids in lists):
        problems.append(f"trainable_token_indices: {described!r}; lowrank reads those of the same tokens in all layers")
    return tuple(lists[0] if lists else ())


def _wrong_kind(fields: Mapping[str, Any]) -> list[str]:
    problems = []
    known = sorted({*(config.peft.type for config in _saved_by_peft()), *_read_as_others()})
    if fields.get("peft_type") not in known:
        problems.append(f"peft_type is {fields.get('peft_type')!r}; lowrank reads {', '.join(known)}")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {fields['task_type']!r}; lowrank reads CAUSAL_LM")
    return problems


def _unsupported(fields: Mapping[str, Any], variant: type[Any]) -> list[str]:
    """One line for every field that changes what the adapter computes in a way lowrank does not know."""
    problems = []
    known = READ | FROM_TENSORS | WITHOUT_MEANING | set(variant.peft.names.values()) | variant.peft.ignored
    known |= set(distinguishing_fields(variant.peft.type))
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


def known_variants() -> dict[str, type[AdapterSettings]]:
    """By type: lowrank's own, and those of third parties that this process has been allowed to load."""
    own = {name: config for name, config in VARIANTS.items() if issubclass(config, AdapterSettings)}
    return {**own, **loaded_third_parties(AdapterSettings)}


def _saved_by_peft() -> list[type[Any]]:
    return [config for config in known_variants().values() if config.peft_fields is not None]


def _read_as_others() -> dict[str, type[AdapterSettings]]:
    """By PEFT's type: variants whose own files in PEFT are read as those of the variant they are saved as."""
    saved = {config.peft.type for config in _saved_by_peft()}
    others = [config for config in known_variants().values() if config.peft.type not in saved]
    return {config.peft.type: config for config in others if config().as_saved().peft.type in saved}


def as_read(
    fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """adapter_config.json and tensors of a kind whose adapters lowrank keeps as another kind's (AdaLoRA's as LoRA), as
    they would be of that kind; of all others as they are."""
    variant = _read_as_others().get(str(fields.get("peft_type")))
    if variant is None:
        return dict(fields), dict(tensors)
    fields, tensors = variant.read_as_saved(fields, tensors)
    return {**fields, "peft_type": variant().as_saved().peft.type}, dict(tensors)


def distinguishing_fields(peft_type: str) -> dict[str, Any]:
    """Every field that tells the variants of one PEFT type apart, at PEFT's default, false."""
    same = [config for config in _saved_by_peft() if config.peft.type == peft_type]
    return {name: False for config in same for name in config.peft_fields} if len(same) > 1 else {}


def _declared_variant(fields: Mapping[str, Any]) -> dict[str, Any]:
    distinguishing = distinguishing_fields(fields["peft_type"])
    return {name: fields.get(name) or default for name, default in distinguishing.items()}


def _variant(fields: Mapping[str, Any]) -> type[Any] | None:
    same = [config for config in _saved_by_peft() if config.peft.type == fields["peft_type"]]
    if len(same) == 1:
        return same[0]
    distinguishing, declared = distinguishing_fields(fields["peft_type"]), _declared_variant(fields)
    return next((config for config in same if {**distinguishing, **config.peft_fields} == declared), None)


def whole(value: float) -> float:
    """16.0 as 16, which PEFT declares an int."""
    return int(value) if float(value).is_integer() else value


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _wrong_values(fields: Mapping[str, Any]) -> list[str]:
    """Values of fields of all kinds that are of another type, or no number that anything can be computed with."""
    problems = []
    for key in ("rank_pattern", "alpha_pattern"):
        given = fields.get(key) or {}
        if not isinstance(given, dict):
            problems.append(f"{key}: {str(given)[:80]!r}; expected {{name or regular expression: number}}")
            continue
        kinds = (int,) if key == "rank_pattern" else (int, float)
        problems += [
            f"{key}: {name[:80]!r} has {str(value)[:40]!r}, not a number above 0"
            for name, value in given.items()
            if not _is_positive(value, kinds)
        ]
        problems += [f"{key}: a key of {len(name)} characters" for name in given if len(name) > _LONGEST_PATTERN]
    written = [config.peft_fields for config in _saved_by_peft() if config.peft.type == fields.get("peft_type")]
    for key, kinds in {"r": (int,), "lora_alpha": (int, float), "num_virtual_tokens": (int,)}.items():
        value = fields.get(key)
        as_written = any(own.get(key) == value for own in written)  # OFT, sized by blocks: r: 0
        if value is not None and not as_written and not _is_positive(value, kinds):
            problems.append(f"{key}: {str(value)[:40]!r}; expected a {'whole ' * (kinds == (int,))}number above 0")
    for key in ("modules_to_save", "target_parameters"):
        value = fields.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            problems.append(f"{key}: {str(value)[:80]!r}; expected a list of names")
    for key in ("base_model_name_or_path", "revision"):
        value = fields.get(key)
        if value is not None and (not isinstance(value, str) or "\0" in value or len(value) > 4096):
            problems.append(f"{key}: {str(value)[:80]!r} is no name")
    return problems


def _is_positive(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and math.isfinite(value) and 0 < value < _LARGEST_NUMBER
