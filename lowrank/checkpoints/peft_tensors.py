"""Tensors in PEFT's adapter files: which module each belongs to, and whether they are as their variant declares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch

from lowrank.adapters.peft_kind import PeftKind, PeftTensor
from lowrank.checkpoints.adapter_folder import CONFIG_FILE
from lowrank.checkpoints.peft_config import (
    BaseDescription,
)
from lowrank.checkpoints.peft_description import Description, known_variants


def names_in_file(parameters: Sequence[str], base: BaseDescription) -> dict[str, str]:
    """PEFT wraps a module of experts once for each adapted parameter, in the model's order, the first innermost."""
    names, by_module = {}, {}
    for name in sorted(parameters, key=lambda name: _place(name, base.expert_parameters)):
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for module, own in by_module.items():
        for depth, name in enumerate(reversed(own)):
            names[name] = module + ".base_layer" * depth
    return names


def parameters_in_file(tensors: Mapping[str, torch.Tensor], wanted: Sequence[str]) -> dict[str, str]:
    """The inverse: {module in the file: parameter}. Files do not say the order; it is the same in all models."""
    found: dict[str, str] = {}
    for item in wanted:
        ending = item.rpartition(".")[0]
        own = sorted(
            {other for other in wanted if other.rpartition(".")[0] == ending}, key=lambda name: _place(name, ())
        )
        for name in tensors:
            match = _part().fullmatch(name)
            module = match["module"] if match else ""
            plain, depth = module.replace(".base_layer", ""), module.count(".base_layer")
            if module and (plain == ending or plain.endswith(f".{ending}")) and depth < len(own):
                found[module] = f"{plain}.{own[-1 - depth].rpartition('.')[2]}"
    return found


def _place(name: str, order: Sequence[str]) -> tuple[int, bool]:
    return (order.index(name) if name in order else 0), name.endswith("down_proj")


def renamed(name: str, names: Mapping[str, str]) -> str:
    """The tensor `name` under its module's name in `names`; as it is if that has none."""
    match = _part().fullmatch(name)
    return f"{names[match['module']]}.{match['part']}" if match and match["module"] in names else name


def sorted_out(
    tensors: Mapping[str, torch.Tensor], description: Description
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str], list[str]]:
    """(an adapter's parts by module, copied module by tensor name, names of all other tensors)."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    copied: dict[str, str] = {}
    rest: list[str] = []
    for name, tensor in tensors.items():
        match = _part().fullmatch(name)
        copy = _copied_module(name, description)
        if match is not None:
            parts.setdefault(match["module"], {})[match["part"]] = tensor
        elif copy is not None:
            copied[name] = copy
        else:
            rest.append(name)
    return parts, copied, rest


def _copied_module(name: str, description: Description) -> str | None:
    """The module a tensor of modules_to_save belongs to, by PEFT's rule: a module whose name ends with an entry."""
    if ".base_layer." in name or of_adapters().search(name):
        return None
    module = name.rpartition(".")[0]
    if description.tied and description.modules_to_save and name.endswith(".weight"):
        return module  # the other end of a tied pair is saved, but not listed
    while module:
        if module.endswith(description.modules_to_save):
            return module
        module = module.rpartition(".")[0]
    return None


def _part() -> re.Pattern[str]:
    """Names of tensors that belong to a module's adapter, of any variant."""
    return _pattern(tuple(tensor.name_in_files for tensor in _all_tensors()))


def of_adapters() -> re.Pattern[str]:
    """Names that no tensor of a base or of a copy has: with the beginning of an adapter's tensors, `lora_`."""
    shared = [name for config in known_variants().values() for name in config.peft.shared]
    return _beginnings((*(tensor.name for tensor in _all_tensors()), *shared))


def _all_tensors() -> list[PeftTensor]:
    return [tensor for config in known_variants().values() for tensor in config.peft.all_tensors]


@lru_cache(maxsize=4)
def _pattern(endings: tuple[str, ...]) -> re.Pattern[str]:
    parts = "|".join(re.escape(ending) for ending in sorted(set(endings)))
    return re.compile(rf"(?P<module>.+)\.(?P<part>{parts})")


@lru_cache(maxsize=4)
def _beginnings(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(^|\.)({'|'.join(sorted({re.escape(name.partition('_')[0]) for name in names}))})_")


def tensor_problems(
    module: str, own: Mapping[str, torch.Tensor], description: Description, *, fused: bool
) -> list[str]:
    """What of a module's tensors is missing, of another kind or shape than the variant declares."""
    rank, _ = description.target(module)
    kind: PeftKind = description.variant.peft
    known = {tensor.name_in_files for tensor in kind.all_tensors}
    problems = [
        f"{module}.{name}: unknown tensor name for a {kind.type} adapter with this {CONFIG_FILE}"
        for name in own
        if name not in known
    ]
    for group in kind.tensors:
        here = [tensor for tensor in group if tensor.name_in_files in own]
        for tensor in group if here else ():
            name = tensor.name_in_files
            if tensor not in here:
                why = f", though {tensor.because} is set" if tensor.because else ""
                problems.append(f"{module}.{name}: missing{why}")
            elif not _fits(tuple(own[name].shape), tensor.shape, rank, fused=fused):
                expected = ", ".join(str(rank) if letter == "R" else "..." for letter in tensor.shape)
                shape = tuple(own[name].shape)
                problems.append(f"{module}.{name}: shape {shape}, expected ({expected}) by {CONFIG_FILE}")
    return problems


def _fits(shape: tuple[int, ...], rule: tuple[str, ...], rank: int, *, fused: bool) -> bool:
    """Whether a tensor has as many dimensions as its rule, and the rank where R stands; of fused experts, one for each
    of them."""
    if len(shape) != len(rule):
        return False
    of_rank = [size for size, letter in zip(shape, rule) if letter == "R"]
    return all(size % rank == 0 if fused else size == rank for size in of_rank)
