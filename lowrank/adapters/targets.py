"""Which layers of a model an adapter goes to, by PEFT's rules."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank.adapters.config import AdapterSettings
from lowrank.errors import ModelError, did_you_mean, raise_all

Value = TypeVar("Value")


@dataclass(frozen=True)
class Targets:
    """Full module names, in the model's order."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    copies: tuple[str, ...]
    """`modules_to_save`: trained whole, as the job's own copy."""
    missed: str | None
    """What `all-linear` cannot reach, in words for the user: fused expert weights."""


def innermost(module: nn.Module) -> nn.Module:
    """The layer under whatever the bank wrapped around it."""
    while getattr(module, "is_routed", False):
        inner = module.base
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def is_linear(module: nn.Module) -> bool:
    """A layer that computes x W^T + b, in any storage, wrapped or not."""
    inner = innermost(module)
    return isinstance(inner, (nn.Linear, Conv1D)) or hasattr(inner, "dense_weight")


def is_embedding(module: nn.Module) -> bool:
    """A lookup table, wrapped or not."""
    return isinstance(innermost(module), nn.Embedding)


def is_row_by_row(module: nn.Module) -> bool:
    """A layer that treats every token alone, so that a slot may have its own: linear, embedding, norm."""
    weight = getattr(innermost(module), "weight", None)
    return is_linear(module) or is_embedding(module) or (isinstance(weight, nn.Parameter) and weight.ndim == 1)


def matches(name: str, wanted: str | Sequence[str]) -> bool:
    """PEFT's rule: one string is a regular expression over the full name; a list holds names or their endings."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def is_copied(name: str, modules_to_save: Sequence[str]) -> bool:
    """PEFT's rule for modules_to_save: endings of full names, not only whole parts (`norm`: every layer norm)."""
    return any(name.endswith(item) for item in modules_to_save)


def by_pattern(patterns: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of the name."""
    return next((value for pattern, value in patterns.items() if _fits(pattern, name)), otherwise)


def _fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_targets(model: Any, config: AdapterSettings) -> Targets:
    """The targets of `config` in `model`; ModelError lists every name that matches nothing."""
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name and not _inside_wrapper(model, name)}
    linears = {name for name, module in modules.items() if is_linear(module)}
    embeddings = {name for name, module in modules.items() if is_embedding(module)}
    wanted = config.target_modules
    if wanted == "all-linear":
        chosen = {name for name in linears if modules[name] is not head}
    else:
        chosen = {name for name in linears | embeddings if matches(name, wanted)}
    chosen -= {name for name in chosen if config.exclude_modules and matches(name, config.exclude_modules)}
    copies = tuple(name for name in modules if is_copied(name, config.modules_to_save))
    if isinstance(wanted, str):  # PEFT: what is copied is no target; named as both, it is for the bank to refuse
        chosen -= set(copies)
    raise_all(ModelError, "adapter: some names match no layer of this model", _unmatched(config, modules, chosen))
    return Targets(
        linears=tuple(name for name in modules if name in chosen & linears),
        embeddings=tuple(name for name in modules if name in chosen & embeddings),
        copies=copies,
        missed=_fused_experts(model) if wanted == "all-linear" else None,
    )


def _inside_wrapper(model: nn.Module, name: str) -> bool:
    """Modules that a routed layer holds are reached through it: `...q_proj.base` is no name of the model."""
    parent = name.rpartition(".")[0]
    while parent:
        if getattr(model.get_submodule(parent), "is_routed", False):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _unmatched(config: AdapterSettings, modules: Mapping[str, nn.Module], chosen: set[str]) -> list[str]:
    candidates = [name for name, module in modules.items() if is_linear(module) or is_embedding(module)]
    last = {name.rpartition(".")[2] for name in candidates}
    problems = []
    for setting, found in (("target_modules", sorted(chosen)), ("exclude_modules", candidates)):
        wanted = getattr(config, setting)
        if isinstance(wanted, str):
            if wanted and not any(matches(name, wanted) for name in found) and wanted != "all-linear":
                problems.append(f"{setting}: {wanted!r} matches no layer; known: {', '.join(sorted(last))}")
            continue
        for item in wanted:
            if not any(matches(name, (item,)) for name in found):
                problems.append(f"{setting}: {item!r}{did_you_mean(item, last)}")
    for setting in ("rank_pattern", "alpha_pattern"):
        for item in getattr(config, setting):
            if not any(_fits(item, name) for name in chosen):
                problems.append(f"{setting}: {item!r} matches no target{did_you_mean(item, last)}")
    for item in config.modules_to_save:
        if not any(is_copied(name, (item,)) for name in modules):
            known = {name.rpartition(".")[2] for name, module in modules.items() if is_row_by_row(module)}
            problems.append(f"modules_to_save: {item!r}{did_you_mean(item, known)}")
    if not problems and not chosen and not config.modules_to_save:
        problems.append("exclude_modules leaves nothing of target_modules to train")
    return problems


def _fused_experts(model: nn.Module) -> str | None:
    """Mixtures keep their experts as 3-D parameters, which no linear layer stands for."""
    fused = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}
    if not fused:
        return None
    share = sum(fused.values()) / sum(parameter.numel() for parameter in model.parameters())
    kinds = sorted({name.rpartition(".")[2] for name in fused})
    return (
        f"{share:.0%} of this model's weights are experts kept as fused parameters ({', '.join(kinds)}); "
        "all-linear does not reach them: attention and shared layers get adapters, the experts stay as they are"
    )
