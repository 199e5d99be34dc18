"""Input scales of a decoder layer's linears, folded into whatever computes those inputs; the layer stays the same.

Which norm or linear computes which linear's input is found by trying: a row of its weight is doubled, and if an input
doubles with it, at every token and exactly there, that input is this row times something that the row does not change.
So keys shared by several heads, ReLU and gated MLPs, norms that multiply by 1 + weight (Gemma) and parallel blocks need
no names here. Every fold is tried out on the whole layer before it is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_SAME = 0.02
"""Relative error below which a channel counts as doubled: bfloat16 rounds by 0.004."""
_LAYER_SAME = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative change of a layer's output that rounding explains; in 16 bits 0.02."""

Run = Callable[[], torch.Tensor]
"""One document through the layer."""


@dataclass(frozen=True)
class Fold:
    """Inputs of `consumers`, all the same (T, D), are rows of `producer` times something."""

    producer: str
    consumers: tuple[str, ...]
    row_D: torch.Tensor
    """The producer's row behind each input."""
    offset: float = 0.0
    """1 where the producer multiplies by 1 + weight."""


def find_folds(parts: Mapping[str, nn.Module], linears: Mapping[str, nn.Module], run: Run) -> list[Fold]:
    """What can be folded in a layer, each group of consumers once. `parts`: its modules by name."""
    inputs, _ = observe(linears, run)
    groups = _groups(inputs)
    found: list[Fold] = []
    for name, part in parts.items():
        weight: Any = getattr(part, "weight", None)
        is_norm = isinstance(weight, nn.Parameter) and weight.ndim == 1
        for offset in (0.0, 1.0) if is_norm else (0.0,) if name in linears else ():
            done = {fold.consumers for fold in found}
            reached = {group[0]: linears[group[0]] for group in groups if name not in group and group not in done}
            with _multiplied(part, offset, torch.full((len(weight),), 2.0)):
                now, _ = observe(reached, run)
            for group in groups:
                if group[0] not in reached:
                    continue
                alive_D = (inputs[group[0]] != 0).any(0)
                doubled_D = _doubled(inputs[group[0]], now[group[0]])
                if doubled_D is None or not bool(doubled_D[alive_D].all()):
                    continue
                row_D = _rows_behind(part, offset, {group[0]: linears[group[0]]}, inputs[group[0]], run)
                if row_D is not None:
                    found.append(Fold(name, group, row_D, offset))
    return found


def _rows_behind(
    part: Any, offset: float, one: Mapping[str, nn.Module], x_TD: torch.Tensor, run: Run
) -> torch.Tensor | None:
    """The row of `part` behind each input: those whose number has a bit are doubled, bit after bit."""
    rows, width = len(part.weight), x_TD.shape[1]
    row_D = torch.zeros(width, dtype=torch.long, device=x_TD.device)
    for bit in range(max(1, (rows - 1).bit_length())):
        with _multiplied(part, offset, 1.0 + ((torch.arange(rows) >> bit) & 1)):
            now, _ = observe(one, run)
        doubled_D = _doubled(x_TD, *now.values())
        if doubled_D is None:
            return None
        row_D |= doubled_D.long() << bit
    alive_D, in_order_D = (x_TD != 0).any(0), torch.arange(width, device=x_TD.device)
    if rows == width and torch.equal(row_D[alive_D], in_order_D[alive_D]):
        return in_order_D  # inputs that were zero all the time (ReLU) are taken to be in order too
    return row_D if bool(alive_D.all()) and int(row_D.max()) < rows else None


def _doubled(x_TD: torch.Tensor, now_TD: torch.Tensor) -> torch.Tensor | None:
    """Which inputs have doubled, (D) bool; None if one does anything else than double or stay."""
    squared_D = x_TD.square().sum(0)
    factor_D = (now_TD * x_TD).sum(0) / squared_D.clamp(min=torch.finfo(torch.float32).tiny)
    double_D = factor_D > 1.5
    off_D = (now_TD - x_TD * (1.0 + double_D.float())).square().sum(0)
    return double_D if bool((off_D <= _SAME**2 * squared_D).all()) else None


@contextmanager
def _multiplied(part: Any, offset: float, factor_R: torch.Tensor) -> Generator[None, None, None]:
    """Rows of a weight and its bias times `factor_R`, for a while."""
    kept = {name: value.detach().clone() for name, value in part.named_parameters(recurse=False)}
    try:
        multiply(part, offset, factor_R)
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                getattr(part, name).copy_(value)


def multiply(part: Any, offset: float, factor_R: torch.Tensor) -> None:
    """Rows of a weight (counted from -`offset`) and of its bias times `factor_R`, in place."""
    with torch.no_grad():
        wide_R = factor_R.to(part.weight.device)
        shape = (-1, *[1] * (part.weight.ndim - 1))
        part.weight.copy_((part.weight.float() + offset) * wide_R.view(shape) - offset)
        if getattr(part, "bias", None) is not None:
            part.bias.copy_(part.bias.float() * wide_R)


def observe(linears: Mapping[str, nn.Module], run: Run) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Inputs (T, D) float32 of each linear that is reached, and the layer's output."""
    inputs: dict[str, torch.Tensor] = {}

    def listen(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            del module
            inputs[name] = given[0].detach().reshape(-1, given[0].shape[-1]).float().clone()

        return hook

    handles = [module.register_forward_pre_hook(listen(name)) for name, module in linears.items()]
    try:
        return inputs, run()
    finally:
        for handle in handles:
            handle.remove()


def _groups(inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
    """Linears that see the same."""
    groups: list[list[str]] = []
    for name, x_TD in inputs.items():
        same = next((group for group in groups if torch.equal(inputs[group[0]], x_TD)), None)
        if same is None:
            groups.append([name])
        else:
            same.append(name)
    return [tuple(group) for group in groups]


def same_output(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two outputs of a layer differ by rounding only."""
    allowed = _LAYER_SAME.get(before.dtype, 0.02)
    return float((after.float() - before.float()).norm()) <= allowed * float(before.float().norm())
