"""A checkpoint's tensors as transformers' loader is to see them: lazy, one `weight` for each linear layer however many
tensors it is stored as, and read the moment the loader wants it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lowrank.errors import LowrankError, ModelError
from lowrank.models.fused_experts import OF_ONE_EXPERT
from lowrank.models.loading.checkpoint_files import StoredTensor
from lowrank.models.placement import leave_unread
from lowrank.models.prequantized import KeepsBytes, PrequantizedReader, by_linear

if TYPE_CHECKING:
    from lowrank.models.loading.quantize_on_load import Packing


def as_weights(packing: Packing, stored: dict[str, StoredTensor], model: Any) -> dict[str, Any]:
    """The checkpoint as if nothing in it were quantized: every packed linear has one `weight`."""
    if packing.layers_arriving is not None:
        watched = _lazy_weights(packing, stored, model)
        return {name: _Watched(each, packing) for name, each in watched.items()}
    return _lazy_weights(packing, stored, model)


def _lazy_weights(packing: Packing, stored: dict[str, StoredTensor], model: Any) -> dict[str, Any]:
    prefix = f"{model.base_model_prefix}."
    if packing.reader is None:
        fused = {name: _FusedWeight(packing, tensor) for name, tensor in stored.items()
                 if {name, prefix + name, name.removeprefix(prefix)} & packing.experts.keys()}  # fmt: skip
        return {**stored, **fused}
    plain, linears = by_linear(packing.reader, stored)
    found: dict[str, Any] = {name: stored[name] for name in plain}
    for name, own in linears.items():
        tensors = {suffix: stored[each] for suffix, each in own.items()}
        there = {name, prefix + name, name.removeprefix(prefix)} & packing.linears.keys()
        of_expert = bool(packing.experts) and OF_ONE_EXPERT.search(name) is not None
        kind = PackedWeight if there else _WeightOfExpert if of_expert else _UnpackedWeight
        found[f"{name}.weight"] = kind(packing, name, tensors)
    return found


class _Watched:
    """A lazy tensor that is about to be read: what came before it is there."""

    def __init__(self, tensor: Any, packing: Packing) -> None:
        self._tensor, self._packing = tensor, packing
        self.shape, self.dtype = getattr(tensor, "shape", None), getattr(tensor, "dtype", None)

    def __getitem__(self, index: Any) -> Any:
        assert self._packing.layers_arriving is not None
        self._packing.layers_arriving.look(self._packing)
        return self._tensor[index]

    def get_shape(self) -> list[int]:
        """As safetensors' slices say it."""
        return self._tensor.get_shape()


class PackedWeight:
    """The tensors of one quantized linear, in the place of its weight. Passes through a loader untouched."""

    def __init__(self, packing: Packing, name: str, tensors: Mapping[str, StoredTensor]) -> None:
        self.packing, self.name, self.tensors = packing, name, tensors

    def __getitem__(self, index: Any) -> PackedWeight:
        return self

    def to(self, *where: Any, **options: Any) -> PackedWeight:
        """Cast and moved later."""
        return self

    def build(self, bias: torch.Tensor | None, leave: bool = False) -> Any:
        """The layer. `leave`: bytes that it keeps as they are stored are left in the file, for whoever places it (see
        placement.unread). Raises ModelError naming the tensor and the file."""
        reader = self.packing.reader
        assert reader is not None
        if leave and isinstance(reader, KeepsBytes):
            left = {suffix: stored for suffix, stored in self.tensors.items()
                    if suffix in reader.as_stored and math.prod(stored.shape) > 1}  # fmt: skip
            module = self._build(reader, bias, left)
            buffers = {reader.as_stored[suffix]: stored for suffix, stored in left.items()}
            if all(getattr(module, name).nbytes == stored.nbytes for name, stored in buffers.items()):
                return leave_unread(module, buffers)  # else it is stored in another type than it is kept in
        return self._build(reader, bias, {})

    def _build(self, reader: PrequantizedReader, bias: torch.Tensor | None, left: Mapping[str, StoredTensor]) -> Any:
        tensors = {
            suffix: torch.empty(stored.shape, dtype=stored.dtype, device="meta") if suffix in left else stored.read()
            for suffix, stored in self.tensors.items()
        }
        try:
            return reader.build(self.name, tensors, bias, self.packing.dtype)
        except LowrankError as error:
            file = next(iter(self.tensors.values())).file
            raise ModelError(f"{file}: {error}") from error


class _UnpackedWeight(PackedWeight):
    """The same where no linear layer stands for it (an expert that is fused with others): dense when it is read."""

    def __getitem__(self, index: Any) -> Any:
        return self.build(None).dense_weight().clone()[index]


class _WeightOfExpert(PackedWeight):
    """The same where packed experts may take it as it is (`expert_loading.ExpertConverter`)."""

    def dense(self) -> torch.Tensor:
        """For whoever cannot."""
        return self.build(None).dense_weight().clone()


class _FusedWeight:
    """All experts of a projection as one stored tensor, read one by one. Passes through a loader untouched."""

    def __init__(self, packing: Packing, stored: StoredTensor) -> None:
        self.packing, self.stored, self.shape = packing, stored, stored.shape

    def __getitem__(self, index: Any) -> Any:
        return self.stored.rows(index, index + 1)[0].to(self.packing.dtype) if isinstance(index, int) else self

    def to(self, *where: Any, **options: Any) -> _FusedWeight:
        """Cast and moved later."""
        return self

    def dense(self) -> torch.Tensor:
        """For an operation that wants it whole."""
        return self.stored.read().to(self.packing.dtype)
