"""Several adapters of one base as one, by PEFT's definitions (`LoraModel.add_weighted_adapter`).

With weights w_i, scales s_i and updates s_i B_i A_i:

    add          sum of w_i s_i B_i A_i, exactly; the ranks add up                     PEFT: cat
    average      add, the weights divided by their sum                                 PEFT: cat
    linear       A and B summed each for itself, with sqrt(w_i s_i); equal ranks       PEFT: linear
    ties         trimmed by magnitude, signs elected, summed (arXiv:2306.01708)        PEFT: ties
    dare         entries dropped at random, the rest scaled up (arXiv:2311.03099)      PEFT: dare_linear
    dare_ties    dropped at random, then signs elected as in ties                      PEFT: dare_ties

The result is a plain LoRA with scale 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field

from lowrank.adapters.variants.lora import LoraConfig
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError, raise_all
from lowrank.settings import Settings

_KEEPS_RANKS = ("add", "average")
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor, float]"
"""A (R, ...), B (..., R) and weight * scale of one adapter at one module."""


class CombineConfig(Settings):
    """How several adapters become one."""

    method: Literal["add", "average", "linear", "ties", "dare", "dare_ties"] = "add"
    """What happens to the updates; see lowrank/export/merge/combine.py."""
    weights: tuple[float, ...] = ()
    """One for each adapter; left out: 1."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.5
    """ties, dare: the share of entries that is kept."""
    seed: int = 0
    """dare: which entries are dropped."""


def combine(adapters: Sequence[tuple[str, AdapterOnDisk]], config: CombineConfig) -> AdapterOnDisk:
    """One adapter from several named ones. Raises ModelError for all that does not go together."""
    weights = config.weights or (1.0,) * len(adapters)
    raise_all(ModelError, "these adapters cannot be combined", _problems(adapters, weights, config.method))
    if config.method == "average":
        weights = tuple(weight / sum(weights) for weight in weights)
    generator = torch.Generator().manual_seed(config.seed)
    tensors: dict[str, torch.Tensor] = {}
    targets: dict[str, tuple[int, float]] = {}
    for module in dict.fromkeys(module for _, adapter in adapters for module in adapter.targets):
        for name_A, name_B in _PAIRS:
            pairs = _pairs_at(module, name_A, name_B, adapters, weights)
            if pairs:
                A, B = _METHODS[config.method](pairs, config.density, generator)
                tensors |= {f"{module}.{name_A}": A, f"{module}.{name_B}": B}
                targets[module] = (len(A), float(len(A)))
    for _, adapter in adapters:
        own = [name for name in adapter.tensors if not any(name.startswith(f"{each}.") for each in adapter.targets)]
        tensors.update({name: adapter.tensors[name] for name in own})
    first = adapters[0][1]
    ranks = [rank for rank, _ in targets.values()]
    usual = max(set(ranks), key=ranks.count) if ranks else 1
    settings: Any = LoraConfig(
        rank=usual,
        alpha=float(usual),
        target_modules=tuple(targets),
        rank_pattern={name: rank for name, (rank, _) in targets.items() if rank != usual},
        alpha_pattern={name: alpha for name, (_, alpha) in targets.items() if alpha != usual},
        modules_to_save=tuple(dict.fromkeys(copy for _, adapter in adapters for copy in adapter.copies)),
    )
    return AdapterOnDisk(settings, tensors, targets, base_name=first.base_name, revision=first.revision)


def _problems(adapters: Sequence[tuple[str, AdapterOnDisk]], weights: Sequence[float], method: str) -> list[str]:
    problems = []
    if len(weights) != len(adapters):
        problems.append(f"{len(adapters)} adapters and {len(weights)} weights; give one weight for each")
    if method == "average" and not sum(weights):
        problems.append("average: the weights sum up to 0")
    for name, adapter in adapters:
        if adapter.config.type not in ("lora", "rslora"):
            problems.append(f"{name} is of type {adapter.config.type}; only lora and rslora are sums of B A")
    copied = [copy for _, adapter in adapters for copy in adapter.copies]
    twice = sorted({copy for copy in copied if copied.count(copy) > 1})
    problems += [f"modules_to_save: several of them have a copy of {copy} of their own" for copy in twice]
    if method not in _KEEPS_RANKS:
        for module in dict.fromkeys(module for _, adapter in adapters for module in adapter.targets):
            ranks = sorted({adapter.targets[module][0] for _, adapter in adapters if module in adapter.targets})
            if len(ranks) > 1:
                described = ", ".join(map(str, ranks))
                problems.append(f"{method} needs equal ranks, {module} has {described}; add and average take any ranks")
                break
    return problems


def _pairs_at(
    module: str, name_A: str, name_B: str, adapters: Sequence[tuple[str, AdapterOnDisk]], weights: Sequence[float]
) -> list[_Pair]:
    pairs = []
    for (_, adapter), weight in zip(adapters, weights):
        if f"{module}.{name_A}" in adapter.tensors and module in adapter.targets:
            scale = adapter.config.build().scale(*adapter.targets[module])
            pairs.append((adapter.tensors[f"{module}.{name_A}"], adapter.tensors[f"{module}.{name_B}"], weight * scale))
    return pairs


def _concatenated(pairs: Sequence[_Pair], density: float, generator: torch.Generator) -> tuple[Any, Any]:
    del density, generator
    return torch.cat([A * weight for A, _, weight in pairs]), torch.cat([B for _, B, _ in pairs], dim=1)


def _each_for_itself(
    thin: Callable[[torch.Tensor, float, torch.Generator], torch.Tensor] | None, elect: bool
) -> Callable[[Sequence[_Pair], float, torch.Generator], tuple[Any, Any]]:
    """A and B separately: thinned, signs elected, summed with the square root of each weight."""

    def merge(pairs: Sequence[_Pair], density: float, generator: torch.Generator) -> tuple[Any, Any]:
        merged = []
        for place in (0, 1):
            # the sign goes on one of the two, or a negative weight would cancel out
            weights = [math.sqrt(abs(w)) * (math.copysign(1, w) if place == 0 else 1) for *_, w in pairs]
            tensors = [(A, B)[place] for A, B, _ in pairs]
            if thin is not None and density < 1:
                tensors = [thin(tensor, density, generator) for tensor in tensors]
            merged.append(_summed(torch.stack(tensors), weights, elect))
        return merged[0], merged[1]

    return merge


def _summed(stacked: torch.Tensor, weights: Sequence[float], elect: bool) -> torch.Tensor:
    weight = torch.tensor(weights, dtype=stacked.dtype).view(-1, *(1,) * (stacked.ndim - 1))
    if not elect:
        return (stacked * weight).sum(0)
    agrees = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1, -1)
    return (stacked * weight * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _largest(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    del generator
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype)
    mask[tensor.abs().reshape(-1).topk(int(density * tensor.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def _at_random(tensor: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


_METHODS: dict[str, Callable[[Sequence[_Pair], float, torch.Generator], tuple[Any, Any]]] = {
    "add": _concatenated,
    "average": _concatenated,
    "linear": _each_for_itself(None, elect=False),
    "ties": _each_for_itself(_largest, elect=True),
    "dare": _each_for_itself(_at_random, elect=False),
    "dare_ties": _each_for_itself(_at_random, elect=True),
}
