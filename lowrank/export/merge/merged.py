"""A base with its adapter merged in (PEFT's merge and unload), tensor by tensor, under the names of its own files.

Merged in float32 from the weights on disk, by the variant's own `merge`; what no adapter reaches is the base's bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from lowrank.adapters.targets import is_embedding
from lowrank.adapters.token_rows import NAME as TOKEN_ROWS
from lowrank.adapters.variants.base import BiasMerge, SharedTensors, Tensors, Variant
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError, raise_all
from lowrank.export.merge.expert_merge import ExpertUpdate, FusedUpdate, by_expert, is_transposed
from lowrank.export.merge.tensor_names import Names, refuse_unmergeable
from lowrank.export.merge.weights import Weights, widened
from lowrank.export.source import Source

_BLOCK_BYTES = 1 << 20
"""Of a tensor merged at once: small enough that a block and its float32 copies stay in the processor's cache."""


@dataclass(frozen=True)
class _Instead:
    """A tensor trained whole (modules_to_save)."""

    tensor: torch.Tensor
    by_rows = False

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        del weight, first, end
        return self.tensor


@dataclass(frozen=True)
class _Rows:
    """Rows of single tokens in the place of the base's."""

    token_ids: tuple[int, ...]
    row_ND: torch.Tensor
    by_rows = True

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        weight = widened(weight.clone())
        for place, token in enumerate(self.token_ids):
            if first <= token < end:
                weight[token - first] = self.row_ND[place].to(weight.dtype)
        return weight


@dataclass(frozen=True)
class _LinearUpdate:
    """A variant's update of a linear layer."""

    variant: Variant
    scale: float
    tensors: Tensors
    transposed: bool

    @property
    def by_rows(self) -> bool:
        """Plain A, B: row o of the result needs row o of the weight and of B only."""
        return set(self.tensors) == {"lora_A", "lora_B"} and not self.transposed

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        tensors = self.tensors
        if self.by_rows:
            tensors = {**tensors, "lora_B": tensors["lora_B"][first:end]}
        if self.transposed:
            return self.variant.merge(weight.t(), self.scale, tensors).t()
        return self.variant.merge(weight, self.scale, tensors)


@dataclass(frozen=True)
class _BiasUpdate:
    """A variant's update of a linear layer's bias: (IA)^3 scales it with the outputs."""

    variant: BiasMerge
    tensors: Tensors
    by_rows = False

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        del first, end
        return self.variant.merge_bias(widened(weight), self.tensors)


@dataclass(frozen=True)
class _EmbeddingUpdate:
    """W (V, D) + scale * (B A)^T of a lookup table."""

    scale: float
    A_RV: torch.Tensor
    B_DR: torch.Tensor
    by_rows = True

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return torch.addmm(widened(weight), self.A_RV[:, first:end].t(), self.B_DR.t(), alpha=self.scale)


_Change = _Instead | _Rows | _LinearUpdate | _BiasUpdate | _EmbeddingUpdate | ExpertUpdate | FusedUpdate


@dataclass(frozen=True)
class MergedTensor:
    """A tensor as it will be written: read from `origin` of the base's files, changed or not."""

    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the base's tensor; what it is written as is the target's affair."""
    change: _Change | None = None


class Merged(Mapping[str, MergedTensor]):
    """Base + adapter as a checkpoint: names, shapes and dtypes at once, values when asked for.

    checkpoint  the base's own files; weights that are quantized there are unpacked
    untied      embedding and head were one tensor in the base and are two now, so the configuration must say
                `tie_word_embeddings: false`
    """

    def __init__(self, source: Source) -> None:
        """Raises ModelError for files that are missing, an adapter of another base, and what cannot be merged."""
        self.checkpoint = Weights(source.base)
        self.untied = False
        self._plans = {name: MergedTensor(name, entry.shape, entry.dtype) for name, entry in self.checkpoint.items()}
        if source.adapter is not None:
            self._merge(source, source.adapter)

    def __getitem__(self, name: str) -> MergedTensor:
        return self._plans[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._plans)

    def __len__(self) -> int:
        return len(self._plans)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole merged tensor, by default in the dtype of the base's."""
        plan = self[name]
        whole = torch.empty(plan.shape, dtype=dtype or plan.dtype)
        at = 0
        for rows in self.blocks(name, dtype):
            if not plan.shape:
                return rows
            whole[at : at + len(rows)] = rows
            at += len(rows)
        return whole

    def blocks(self, name: str, dtype: torch.dtype | None = None) -> Iterator[torch.Tensor]:
        """The merged tensor in blocks of whole rows, in order; a scalar is one block.

        ModelError if a value does not fit into `dtype` (float16 ends at 65504).
        """
        for first, end in row_ranges(self[name]):
            yield self.block(name, first, end, dtype)

    def block(self, name: str, first: int, end: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One of the blocks of `row_ranges`. May be asked for in any order and by several threads."""
        plan = self[name]
        rows = self.checkpoint[plan.origin].rows(first, end)
        if plan.change is not None:
            rows = plan.change(rows, first, end)
        return _cast(name, rows, dtype or plan.dtype)

    def is_unchanged(self, name: str, dtype: torch.dtype | None = None) -> bool:
        """Whether its bytes in `dtype` are those of the base's file."""
        plan = self[name]
        return plan.change is None and dtype in (None, plan.dtype)

    def _merge(self, source: Source, adapter: AdapterOnDisk) -> None:
        refuse_unmergeable(source.name, adapter)
        names = Names(source.base, self.checkpoint, trust_remote_code=source.model.runs_own_code)
        heading = f"{source.name}: this adapter does not fit the base in {source.base}"
        raise_all(ModelError, heading, names.refusals(adapter))
        self._merge_experts(adapter, names)
        changes = _changes(adapter, names)
        parameters = set(changes)
        if names.tied & parameters and not all(isinstance(changes[name], _Rows) for name in names.tied & parameters):
            self.untied = True
            parameters |= names.tied  # the other end of the pair keeps what the base has
        for parameter in parameters:
            entry = self.checkpoint[names.origin(parameter)]
            change = changes.get(parameter)
            kept_tied = parameter in names.tied and not self.untied
            name = names.origin(parameter) if kept_tied else names.file_name(parameter)
            self._plans[name] = MergedTensor(names.origin(parameter), entry.shape, entry.dtype, change)

    def _merge_experts(self, adapter: AdapterOnDisk, names: Names) -> None:
        """Of every tensor in the files that is a part of fused experts with an adapter."""
        variant = adapter.config.build()
        for parameter, (rank, alpha) in adapter.targets.items():
            if parameter not in adapter.config.target_parameters:
                continue
            pieces, scale = names.pieces(parameter), variant.scale(rank, alpha)
            A, B = (adapter.tensors[f"{parameter}.lora_{part}.weight"] for part in ("A", "B"))
            A_ERD, B_EOR = by_expert(A, B, names.model.get_parameter(parameter).shape[0])
            if pieces is None:
                name = names.origin(parameter)
                change = FusedUpdate(scale, A_ERD, B_EOR, is_transposed(names.model, parameter))
                self._plans[name] = replace(self._plans[name], change=change)
            for piece in pieces or ():
                B_NR = B_EOR[piece.expert][piece.row_N]
                change = ExpertUpdate(scale, A_ERD[piece.expert], B_NR, piece.transposed)
                self._plans[piece.name] = replace(self._plans[piece.name], change=change)


def _changes(adapter: AdapterOnDisk, names: Names) -> dict[str, _Change]:
    """What happens to each parameter that the adapter reaches, by the model's names."""
    variant = adapter.config.build()
    shapes = {module: names.layer_shape(module) for module in adapter.targets if names.has_linear(module)}
    drawn: dict[str, Tensors] = {}
    if shapes and isinstance(variant, SharedTensors):
        drawn = variant.shared_tensors(shapes, adapter.config.rank, adapter.tensors)
    changes: dict[str, _Change] = {}
    for name, tensor in adapter.tensors.items():
        if name.endswith(TOKEN_ROWS):
            changes[f"{name.removesuffix(TOKEN_ROWS)}weight"] = _Rows(adapter.config.trainable_token_indices, tensor)  # type: ignore[arg-type]
        elif name not in variant.frozen and not any(name.startswith(f"{module}.") for module in adapter.targets):
            changes[name] = _Instead(tensor)
    for module, (rank, alpha) in adapter.targets.items():
        if module in adapter.config.target_parameters:
            continue  # see Merged._merge_experts
        parts = {
            name.removeprefix(f"{module}.").removesuffix(".weight"): widened(tensor)
            for name, tensor in adapter.tensors.items()
            if name.startswith(f"{module}.")
        }
        parts = {**drawn.get(module, {}), **parts}
        scale = variant.scale(rank, alpha)
        if is_embedding(names.model.get_submodule(module)):
            changes[f"{module}.weight"] = _EmbeddingUpdate(scale, parts["lora_embedding_A"], parts["lora_embedding_B"])
        else:
            changes[f"{module}.weight"] = _LinearUpdate(variant, scale, parts, names.is_transposed(module))
            has_bias = getattr(names.model.get_submodule(module), "bias", None) is not None
            if isinstance(variant, BiasMerge) and has_bias:
                changes[f"{module}.bias"] = _BiasUpdate(variant, parts)
    return changes


def row_ranges(plan: MergedTensor) -> Iterator[tuple[int, int]]:
    """Blocks of rows of about _BLOCK_BYTES; one block where a change needs the whole tensor."""
    if not plan.shape or (plan.change is not None and not plan.change.by_rows):
        yield 0, plan.shape[0] if plan.shape else 1
        return
    row_bytes = max(1, plan.dtype.itemsize * torch.Size(plan.shape[1:]).numel())
    step = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, plan.shape[0], step):
        yield first, min(first + step, plan.shape[0])


def _cast(name: str, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    cast = rows.to(dtype)
    if dtype == torch.float16 and rows.dtype != dtype and not cast.isfinite().all() and rows.isfinite().all():
        raise ModelError(f"{name}: has values above 65504, which float16 cannot hold; use bfloat16 or float32")
    return cast
