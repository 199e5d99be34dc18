"""What every storage can do, found out by doing it: the table of `lowrank doctor` and of docs/storages.md."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import lowrank.models.prequantized as prequantized
from lowrank.adapters.gradient_check import TOLERANCE, gradient_errors
from lowrank.errors import LowrankError, first_line
from lowrank.models.prequantized.bnb import as_tensors
from lowrank.settings import Settings, configs_in

STORAGES = "lowrank.models.storages"
_SIZE = 512


@dataclass(frozen=True)
class Capability:
    """One storage on one device, in one dtype."""

    storage: str
    dtype: str
    """What was computed in."""
    train: bool
    """The gradient is right: in training, after an evaluation, recomputed, with and without adapters."""
    merge: bool
    """An adapter can be added to its dense weight."""
    save: bool
    """`lowrank quantize` can write it."""
    bits: float
    """Per weight, scales and all; of a 512 x 512 matrix of normal weights."""
    relative_error: float
    """Of the same matrix."""
    problem: str | None = None


def storage_capabilities(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Capability]:
    """Probe every storage, by its default settings."""
    return [_probe(name, kind(), device, dtype) for name, kind in configs_in(STORAGES).items()]


def _probe(name: str, config: Settings, device: torch.device, dtype: torch.dtype) -> Capability:
    generator, computed_in = torch.Generator().manual_seed(0), str(dtype).removeprefix("torch.")
    plain = nn.Linear(_SIZE, _SIZE, bias=False).requires_grad_(False)
    plain.weight.copy_(torch.randn(_SIZE, _SIZE, generator=generator))
    plain = plain.to(device, dtype)
    try:
        layer: Any = config.wrap(plain)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
        dense = layer.dense_weight().clone()
        size = sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())
        errors = gradient_errors(layer, layer, dtype, device)
        wrong = [situation for situation, error in errors.items() if not error < TOLERANCE[dtype]]
        return Capability(
            storage=name,
            dtype=computed_in,
            train=not wrong,
            merge=dense.shape == plain.weight.shape and bool(dense.isfinite().all()),
            save=name == "dense" or _is_writable(layer),
            bits=8 * size / dense.numel(),
            relative_error=((dense - plain.weight).norm() / plain.weight.norm()).item(),
            problem=f"wrong gradient: {', '.join(wrong)}" if wrong else None,
        )
    except (LowrankError, RuntimeError, ImportError, NotImplementedError) as error:
        return Capability(name, computed_in, False, False, False, float("nan"), float("nan"), first_line(error))


def _is_writable(layer: nn.Module) -> bool:
    try:
        as_tensors(layer)
    except LowrankError:
        return False
    return True


def readers() -> Mapping[str, str]:
    """`{quant_method: what it is}` of checkpoints that come quantized."""
    found = {}
    for module in pkgutil.iter_modules(prequantized.__path__):
        file = importlib.import_module(f"{prequantized.__name__}.{module.name}")
        summary = " ".join((file.__doc__ or "").split("\n\n")[0].split())
        found.update(dict.fromkeys(getattr(file, "METHODS", ()), summary))
    return found


def as_json(capabilities: list[Capability]) -> list[dict[str, Any]]:
    """For `--json`."""
    return [asdict(each) for each in capabilities]
