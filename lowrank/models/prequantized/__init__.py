"""Checkpoints somebody else has quantized, as frozen bases to train on: one file each.

We read the published format itself; the tool that wrote it need not be installed (most pin another
torch). A file names the `quant_method`s of `config.json` it reads in `METHODS` and has a function
`reader(quantization_config) -> Reader`, which refuses what it cannot read before any weight is loaded.
What comes out is a `BaseLinear`: weights stay packed in memory, are unpacked for one product at a time,
and the gradient goes through the unpacked weight, in training and after an evaluation alike.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from lowrank.errors import ModelError


class PrequantizedReader(Protocol):
    """Builds the linears of one checkpoint."""

    suffixes: tuple[str, ...]
    """How the tensors of one linear are called, after the linear's name and a dot. A linear of the checkpoint is
    quantized if there is any of them besides `weight`; one with a plain `weight` is not."""
    notice: str | None
    """What a person should know before training on it, or None."""

    def build(
        self, name: str, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> nn.Module:
        """A `BaseLinear` that computes in `dtype`, from the tensors of linear `name` by suffix (those there are).

        Raises ModelError naming the tensor: one is missing, or its shape or dtype does not fit the format.
        """
        ...


@runtime_checkable
class KeepsBytes(Protocol):
    """A reader some of whose tensors are kept as they are stored: who needs a part of one reads that part."""

    @property
    def as_stored(self) -> Mapping[str, str]:
        """The buffer of the layer that has the very bytes of a tensor, by suffix. `build` may be given such a tensor on
        the meta device."""
        ...


def reader_for(quantization_config: Mapping[str, Any] | None) -> PrequantizedReader | None:
    """The reader that `config.json`'s `quantization_config` asks for; None if the checkpoint is not quantized.

    Raises ModelError where nothing here can read it.
    """
    if not quantization_config:
        return None
    method = str(quantization_config.get("quant_method", "")).lower()
    files = _files()
    file = files.get(method) or files.get(method.replace("_", "-"))  # compressed_tensors is compressed-tensors
    if file is None:
        raise ModelError(
            f"config.json: quantization_config.quant_method is {method!r}, which lowrank cannot read; it reads "
            f"{', '.join(sorted(files))}. Take the model's 16-bit checkpoint and let lowrank quantize it while it "
            "loads: model.storage: nf4 (or int8, hqq)"
        )
    return importlib.import_module(file).reader(quantization_config)


def by_linear(reader: PrequantizedReader, names: Iterable[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Names of tensors that stand for themselves, and of every quantized linear its tensors' names by suffix."""
    suffixes = sorted(reader.suffixes, key=len, reverse=True)
    plain: list[str] = []
    linears: dict[str, dict[str, str]] = {}
    for name in names:
        suffix = next((each for each in suffixes if name.endswith(f".{each}")), None)
        if suffix is None:
            plain.append(name)
        else:
            linears.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = name
    for linear in [linear for linear, own in linears.items() if own.keys() <= {"weight"}]:
        plain += linears.pop(linear).values()
    return plain, linears


def _files() -> dict[str, str]:
    """`{quant_method: module}` of every file of this folder."""
    found: dict[str, str] = {}
    for module in pkgutil.iter_modules(__path__):
        path = f"{__name__}.{module.name}"
        found.update(dict.fromkeys(getattr(importlib.import_module(path), "METHODS", ()), path))
    return found
