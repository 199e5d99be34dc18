"""Experts packed while they load: a fused parameter never exists, only one expert's matrix at a time.

Files hold each expert's projections apart, and transformers stacks and joins them (a `WeightConverter`). Its operations
are run here on one expert after the other; what comes out is packed before the next is read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    log_conversion_errors,
)

from lowrank.models.fused_experts import PackedExperts, fused_shapes, projections, why_unknown
from lowrank.models.storages import StorageConfig
from lowrank.models.storages.packed import is_skipped

_JOINING = (MergeModulelist, Concatenate, Transpose)
"""Operations that only put matrices side by side; packed ones need none of them."""


class ExpertsToPack:
    """One fused parameter: what it is to become, expert by expert."""

    def __init__(self, shape: tuple[int, ...], transposed: bool) -> None:
        self.count, rows, columns = shape
        self.shape = (columns, rows) if transposed else (rows, columns)
        """(O, D) of an expert."""
        self.transposed = transposed
        self.packed: list[nn.Module | None] = [None] * self.count

    @property
    def done(self) -> list[nn.Module] | None:
        """All matrices; None as long as one is missing."""
        found = [each for each in self.packed if each is not None]
        return found if len(found) == self.count else None


def experts_to_pack(model: nn.Module, storage: StorageConfig | None) -> dict[str, Any]:
    """Modules of fused experts that can be run one by one and are not to be skipped, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, PackedExperts)
        and why_unknown(module) is None
        and fused_shapes(module).keys() >= set(projections(module))
        and not is_skipped(name, storage)
    }


def parameters_to_pack(experts: Mapping[str, Any]) -> dict[str, ExpertsToPack]:
    """Their fused parameters, by full name."""
    return {
        f"{name}.{projection}": ExpertsToPack(fused_shapes(module)[projection], module.is_transposed)
        for name, module in experts.items()
        for projection in projections(module)
    }


def pack_matrix(storage: StorageConfig, weight_OD: torch.Tensor) -> nn.Module:
    """One matrix in a storage."""
    holder = nn.Linear(weight_OD.shape[1], weight_OD.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight_OD, requires_grad=False)
    return storage.wrap(holder)


def with_packed_experts(model: Any, experts: Mapping[str, Any], found: Mapping[str, ExpertsToPack]) -> None:
    """Put packed experts in their places; a projection of which none was packed stays as it is."""
    for name, module in experts.items():
        packed = {each: found[f"{name}.{each}"].done for each in projections(module)}
        packed = {each: matrices for each, matrices in packed.items() if matrices is not None}
        if packed:
            model.set_submodule(name, PackedExperts(module, packed))


class ExpertConverter(WeightConverter):
    """Has experts packed as they come, by `quantize_on_load.Packing`; converts other tensors as ever."""

    def convert(
        self, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, loading_info: Any = None
    ) -> Any:
        """Nothing is left to set where a fused parameter was packed."""
        packing = hf_quantizer.quantization_config
        wanted: ExpertsToPack | None = packing.experts.get(layer_name)
        jobs: dict[str, list[Any]] = dict(self.collected_tensors)
        if wanted is None or any(len(each) != wanted.count for each in jobs.values()) or not self._packs(packing):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)
        self.collected_tensors = defaultdict(list)
        for index in range(wanted.count):
            with log_conversion_errors(layer_name, loading_info, (len(jobs), layer_name), None):
                one = {pattern: [each[index]()] for pattern, each in jobs.items()}
                packing.pack_expert(layer_name, index, self._joined(one, layer_name, model, config))
        packing.is_there(model, layer_name, loading_info.missing_keys)
        return {}

    def _packs(self, packing: Any) -> bool:
        """We quantize; or the checkpoint has, and its matrices need only be put side by side."""
        if packing.storage is not None:
            return True
        first: Any = next(iter(self.collected_tensors.values()))[0]
        only_joins = all(isinstance(operation, _JOINING) for operation in self.operations)
        return only_joins and not isinstance(first(), torch.Tensor)

    def _joined(self, one: dict[str, Any], layer_name: str, model: Any, config: Any) -> Any:
        """One expert's matrix as the fused parameter has it; where its parts are packed already, a list of them."""
        parts = [one[pattern][0] for pattern in self.source_patterns if pattern in one]
        if not isinstance(parts[0], torch.Tensor):
            return parts
        for operation in self.operations:
            one = operation.convert(
                one,
                source_patterns=self.source_patterns,
                target_patterns=self.target_patterns,
                full_layer_name=layer_name,
                model=model,
                config=config,
            )
        (joined,) = one.values()
        return (joined[0] if isinstance(joined, list) else joined)[0]

    def materialize_tensors(self) -> dict[str, list[torch.Tensor]]:
        """Dense ones, for operations that are transformers' own."""
        read = super().materialize_tensors()
        return {pattern: [_dense(each) for each in tensors] for pattern, tensors in read.items()}


def one_by_one(converters: Sequence[Any], projections: Sequence[str]) -> list[Any]:
    """transformers' conversions so; and one for each of `projections` as `lowrank quantize` writes it."""
    found = []
    for each in converters:
        if type(each) is WeightConverter:
            sources, targets = each._original_source_patterns, each._original_target_patterns  # pyright: ignore[reportPrivateUsage]
            patterns = list(sources), list(targets)
            others = {name: getattr(each, name) for name in ("force_cpu",) if hasattr(each, name)}  # by release
            copied = ExpertConverter(*patterns, operations=each.operations, **others)
            for name in ("scope_prefix", "base_model_prefix"):
                if hasattr(each, name):
                    setattr(copied, name, getattr(each, name))
            each = copied
        found.append(each)
    known = {pattern for each in converters for pattern in each.source_patterns}
    for projection in projections:
        source = f"experts.*.{projection}.weight"
        if not any(pattern.endswith(source) for pattern in known):
            found.append(ExpertConverter([source], [f"experts.{projection}"], operations=[MergeModulelist(dim=0)]))
    return found


def _dense(tensor: Any) -> torch.Tensor:
    return tensor if isinstance(tensor, torch.Tensor) else tensor.dense()
