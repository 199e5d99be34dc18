"""Adapters on fused experts, merged into the files of a checkpoint, where every expert may have tensors of its own.

transformers fuses the experts of a layer as it loads them (`gate_up_proj`, (E, O, D)) and can undo that. Which rows of
which expert a tensor in the files holds is found out by undoing it for a tensor that says so in its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from lowrank.errors import ModelError
from lowrank.export.merge.weights import widened

_PROBE_WIDTH = 2
"""Inputs of the tensor that is tried out; how many there are changes nothing for the rows."""


@dataclass(frozen=True)
class ExpertSlice:
    """A tensor in the files: rows `row_N` of expert `expert`, as (N, D), or (D, N) if `transposed`."""

    name: str
    expert: int
    row_N: torch.Tensor
    transposed: bool


@dataclass(frozen=True)
class ExpertUpdate:
    """W + scale * B A of one expert's rows."""

    scale: float
    A_RD: torch.Tensor
    B_NR: torch.Tensor
    transposed: bool

    @property
    def by_rows(self) -> bool:
        """Whether a row of the file's tensor needs that row only."""
        return not self.transposed

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        weight = widened(weight)
        A_RD, B_NR = self.A_RD.to(weight.dtype), self.B_NR.to(weight.dtype)
        if self.transposed:
            return torch.addmm(weight, A_RD.t(), B_NR.t(), alpha=self.scale)
        return torch.addmm(weight, B_NR[first:end], A_RD, alpha=self.scale)


@dataclass(frozen=True)
class FusedUpdate:
    """The same of all experts, in files that have them fused too: (E, O, D), or (E, D, O) if `transposed`."""

    scale: float
    A_ERD: torch.Tensor
    B_EOR: torch.Tensor
    transposed: bool
    by_rows = True

    def __call__(self, weight: torch.Tensor, first: int, end: int) -> torch.Tensor:
        weight = widened(weight)
        update_EOD = self.B_EOR[first:end].to(weight.dtype) @ self.A_ERD[first:end].to(weight.dtype)
        return weight + self.scale * (update_EOD.transpose(1, 2) if self.transposed else update_EOD)


def by_expert(A: torch.Tensor, B: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(E, R, D) and (E, O, R) of PEFT's lora_A (R E, D) and lora_B (O, R E) of `target_parameters`."""
    return A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts).permute(2, 0, 1)


def is_transposed(model: Any, parameter: str) -> bool:
    """Whether the fused parameter is kept as (E, D, O)."""
    return bool(getattr(model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False))


def pieces_of(model: Any, parameter: str, in_files: Sequence[str]) -> list[ExpertSlice]:
    """The tensors in the files that a fused parameter of `model` (on `meta`) is made of. ModelError if unclear."""
    shape = model.get_parameter(parameter).shape
    transposed = is_transposed(model, parameter)
    experts, rows = shape[0], shape[2] if transposed else shape[1]
    code_EO = torch.arange(experts * rows).view(experts, rows)
    probe = code_EO[:, :, None].expand(experts, rows, _PROBE_WIDTH)
    undone = revert_weight_conversion(model, {parameter: probe.transpose(1, 2) if transposed else probe})
    found = []
    for name in in_files:
        code = undone.get(name)
        if code is None or code.ndim != 2 or _PROBE_WIDTH not in code.shape:
            raise ModelError(f"{parameter}: transformers does not say how {name} is part of it")
        turned = bool((code[:1] == code).all()) and code.shape[0] == _PROBE_WIDTH
        code_N = code[0] if turned else code[:, 0]
        expert = int(code_N[0]) // rows
        row_N = code_N - expert * rows
        if not bool(((row_N >= 0) & (row_N < rows)).all()):
            raise ModelError(f"{parameter}: {name} holds rows of several experts")
        found.append(ExpertSlice(name, expert, row_N, turned))
    return found
