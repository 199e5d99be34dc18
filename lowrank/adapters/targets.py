"""Which layers of a model an adapter goes to, by PEFT's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from lowrank.adapters import patterns
from lowrank.adapters.config import AdapterSettings
from lowrank.errors import ModelError, did_you_mean, raise_all
from lowrank.models.fused_experts import OF_ONE_EXPERT, PackedExperts, fused_shapes
from lowrank.models.layers import PROJECTOR, SOUND, TOWER, Parts, is_outside, language_model
from lowrank.models.plain_linear import is_plain_linear
from lowrank.models.storages.packed import PackedLinear

Value = TypeVar("Value")


@dataclass(frozen=True)
class Targets:
    """Full module names, in the model's order."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    copies: tuple[str, ...]
    """`modules_to_save`: trained whole, as the job's own copy."""
    parameters: tuple[str, ...]
    """`target_parameters`: fused weights of experts, by full name."""
    unmatched_note: str | None
    """What `all-linear` leaves out (experts, towers) and settings that match nothing, for people; None: nothing."""
    adapts_tower: bool = False
    """Some of them are in a tower or a projector."""


def innermost(module: nn.Module) -> nn.Module:
    """The layer under whatever the bank wrapped around it."""
    while getattr(module, "is_routed", False):
        inner = module.base
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The full name of a module of the model."""
    return next(name for name, module in model.named_modules() if module is wanted)


def is_linear(module: nn.Module) -> bool:
    """A layer that computes x W^T + b, in any storage, wrapped or not."""
    inner = innermost(module)
    from transformers.pytorch_utils import Conv1D  # here, since settings are read without transformers

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
        return patterns.whole(wanted, name)
    return any(name == item or name.endswith(f".{item}") for item in wanted)


def is_copied(name: str, modules_to_save: Sequence[str]) -> bool:
    """PEFT's rule for modules_to_save: endings of full names, not only whole parts (`norm`: every layer norm)."""
    return any(name.endswith(item) for item in modules_to_save)


def by_pattern(values: Mapping[str, Value], name: str, otherwise: Value) -> Value:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the end of the name."""
    return next((value for pattern, value in values.items() if patterns.at_the_end(pattern, name)), otherwise)


def find_targets(model: Any, config: AdapterSettings) -> Targets:
    """The targets of `config` in `model`; ModelError lists every name that matches nothing."""
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if name and not _inside_wrapper(model, name)}
    linears = {name for name, module in modules.items() if is_linear(module)}
    embeddings = {name for name, module in modules.items() if is_embedding(module)}
    wanted = config.target_modules
    fused = tuple(fused_parameters(model))
    parameters = tuple(name for name in fused if any(_is_parameter(name, item) for item in config.target_parameters))
    parts = Parts(model)
    if wanted == "all-linear":
        chosen = {
            name
            for name in linears
            if modules[name] is not head
            and not OF_ONE_EXPERT.search(name)
            and parts.of(name) in config.parts
            and _is_plain(innermost(modules[name]))
        }
    else:
        chosen = {name for name in linears | embeddings if matches(name, wanted)}
        chosen -= _namesakes(chosen, wanted, parts, config)
    chosen -= {name for name in chosen if config.exclude_modules and matches(name, config.exclude_modules)}
    copies = tuple(name for name in modules if is_copied(name, config.modules_to_save))
    if isinstance(wanted, str):  # PEFT: what is copied is no target; named as both, it is for the bank to refuse
        chosen -= set(copies)
    problems = _unmatched(config, modules, chosen, parameters, fused)
    if config.freeze_language_model and not parts.has_tower:
        problems = ["freeze_language_model: true leaves nothing to train, as this base has no vision tower"]
    raise_all(ModelError, "adapter: some names match no layer of this model", problems)
    notices = [_left_out(model, set(linears) - chosen, set(parameters)) if wanted == "all-linear" else None]
    notices += _reaching_nothing(config, {parts.of(name) for name in chosen})
    return Targets(
        linears=tuple(name for name in modules if name in chosen & linears),
        embeddings=tuple(name for name in modules if name in chosen & embeddings),
        copies=copies,
        parameters=parameters,
        unmatched_note="; ".join(filter(None, notices)) or None,
        adapts_tower=any(parts.is_outside(name) for name in (*chosen, *copies)),
    )


def fused_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the 3-D weights of experts by full name, in the model's order; packed or not, whatever the bank
    wrapped around them."""
    return {
        f"{name}.{key}": shape
        for name, module in model.named_modules()
        if name and "expert" in name and not _inside_wrapper(model, name)
        for key, shape in fused_shapes(innermost(module)).items()
    }


def is_of_one_expert(name: str) -> bool:
    """A layer of one expert among a list: it sees only the tokens that chose it."""
    return OF_ONE_EXPERT.search(name) is not None


def _is_parameter(name: str, item: str) -> bool:
    """PEFT's rule for target_parameters."""
    return name == item or name.endswith(f".{item}")


def holds_layers(module: nn.Module) -> bool:
    """What is in it is reached through it: a routed layer, packed experts."""
    return getattr(module, "is_routed", False) or isinstance(module, PackedExperts)


def _inside_wrapper(model: nn.Module, name: str) -> bool:
    """`...q_proj.base` is no name of the model."""
    parent = name.rpartition(".")[0]
    while parent:
        if holds_layers(model.get_submodule(parent)):
            return True
        parent = parent.rpartition(".")[0]
    return False


def _namesakes(chosen: set[str], wanted: str | Sequence[str], parts: Parts, config: AdapterSettings) -> set[str]:
    """Layers of frozen parts that a list of names reaches only since the language model has layers of the same last
    names: `q_proj` means its own. And those of the language model, where that is frozen."""
    if isinstance(wanted, str) or not parts.language:
        return set()
    own = [name for name in chosen if not parts.is_outside(name)]
    inside = {item for item in wanted if any(matches(name, (item,)) for name in own)}
    others = [item for item in wanted if item not in inside]
    frozen = {name for name in chosen if parts.of(name) not in config.parts}
    return {name for name in frozen if not parts.is_outside(name) or not matches(name, others)}


def _is_plain(layer: nn.Module) -> bool:
    """Not a layer that makes more of its product (Llama 4's router)."""
    return not isinstance(layer, nn.Linear) or is_plain_linear(type(layer))


def _unmatched(
    config: AdapterSettings,
    modules: Mapping[str, nn.Module],
    chosen: set[str],
    parameters: Sequence[str],
    fused: Sequence[str],
) -> list[str]:
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
            if not any(patterns.at_the_end(item, name) for name in (*chosen, *parameters)):
                problems.append(f"{setting}: {item!r} matches no target{did_you_mean(item, last)}")
    for item in config.modules_to_save:
        if not any(is_copied(name, (item,)) for name in modules):
            known = {name.rpartition(".")[2] for name, module in modules.items() if is_row_by_row(module)}
            problems.append(f"modules_to_save: {item!r}{did_you_mean(item, known)}")
    for item in config.target_parameters:
        if not any(_is_parameter(name, item) for name in fused):
            endings = {".".join(name.split(".")[-3:]) for name in fused}
            known = did_you_mean(item, endings) if fused else "; this model has no fused experts: name linear layers"
            problems.append(f"target_parameters: {item!r}{known}")
    if not problems and not chosen and not config.modules_to_save and not parameters:
        problems.append("exclude_modules leaves nothing of target_modules to train")
    return problems


def _weights_in(module: nn.Module) -> int:
    """Weights of a module itself, packed or not."""
    if isinstance(module, PackedLinear):
        return module.in_features * module.out_features
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def _reaching_nothing(config: AdapterSettings, reached: set[str]) -> list[str]:
    """Parts of the model that settings thaw and no target is in: there is none, or names stand elsewhere."""
    thawed = {
        "freeze_vision_tower": ((TOWER, SOUND), "the towers for pictures and sounds"),
        "freeze_multi_modal_projector": ((PROJECTOR,), "the projector"),
    }
    return [
        f"adapter.{name}: false has no effect: {what} has no layer among this adapter's, if this base has one at all"
        for name, (parts, what) in thawed.items()
        if parts[0] in config.parts and reached.isdisjoint(parts)
    ]


def _left_out(model: Any, linears_left: set[str], parameters: set[str]) -> str | None:
    """Experts and towers that get no adapter, in words for the user."""
    notices = [_experts_left_out(model, linears_left, parameters), _towers_left_out(model, linears_left)]
    return "; ".join(filter(None, notices)) or None


def _towers_left_out(model: Any, linears_left: set[str]) -> str | None:
    """Layers beside the language model, which pictures or sound run and text does not."""
    language, head = language_model(model)[0], model.get_output_embeddings()
    outside = [
        name for name in sorted(linears_left) if is_outside(name, language) and model.get_submodule(name) is not head
    ]
    if not outside:
        return None
    parent = language.rpartition(".")[0]
    parts = {name.removeprefix(f"{parent}.").partition(".")[0]: None for name in outside}
    return (
        f"beside its language model this base has {', '.join(parts)} ({len(outside)} linear layers) for what is not "
        "text: all-linear leaves them as they are (adapter.freeze_vision_tower and freeze_multi_modal_projector: false "
        "reach those for pictures and sounds)"
    )


def _experts_left_out(model: nn.Module, linears_left: set[str], parameters: set[str]) -> str | None:
    """Experts that get no adapter: fused 3-D parameters, and layers that see only some of the tokens."""
    fused = {name: shape for name, shape in fused_parameters(model).items() if name not in parameters}
    listed = [name for name in linears_left if is_of_one_expert(name)]
    if fused:
        size = sum(map(math.prod, fused.values()))
        total = sum(_weights_in(module) for module in model.modules())
        kinds = sorted({".".join(name.split(".")[-2:]) for name in fused})
        return (
            f"{size / total:.0%} of this model's weights are experts kept as fused parameters; all-linear does not "
            "reach them: attention and shared layers get adapters, the experts stay as they are. To train them too: "
            f"adapter.target_parameters: [{', '.join(kinds)}]"
        )
    if listed:
        return (
            f"{len(listed)} layers of single experts see only the tokens that chose them, so all-linear leaves them "
            "out: attention and shared layers get adapters, the experts stay as they are"
        )
    return None
