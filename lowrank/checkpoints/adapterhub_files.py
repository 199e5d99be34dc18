"""Bottleneck adapters on disk, as AdapterHub's library `adapters` keeps them: adapter_config.json, adapter.safetensors.

    {"config": {"mh_adapter": true, "reduction_factor": 16, ...}, "model_name": ..., "hidden_size": ..., "name": ...}

    <layer>.attention_adapters.adapters.<name>.adapter_down.0.weight (M, D), .bias (M)       behind the attention
    <layer>.output_adapters.adapters.<name>.adapter_up.weight (D, M), .bias (D)              behind the MLP
    ....scaling (1) or (D), ....adapter_norm_before.weight, ....adapter_norm_after.weight    where the settings ask

PEFT's file of settings has the same name; AdapterHub's has `config` in it. The bank's names are those of the file
without `adapters.<name>.`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lowrank.adapters import variants
from lowrank.adapters.bottleneck import BottleneckSettings
from lowrank.checkpoints.tensor_file import write_tensors
from lowrank.errors import ModelError, raise_all
from lowrank.setting_problems import error_lines
from lowrank.settings import configs_in

TENSOR_FILE = "adapter.safetensors"
PICKLE = "pytorch_adapter.bin"
NAME = "lowrank"
"""How AdapterHub's library is to call an adapter of ours."""

_TENSOR = re.compile(r"(?P<place>[\w.]+\.(attention|output)_adapters)\.adapters\.(?P<name>[^.]+)\.(?P<part>[\w.]+)")
_VARIANTS: dict[str, Any] = {
    name: config for name, config in configs_in(variants.__name__).items() if issubclass(config, BottleneckSettings)
}
_OWN = tuple(name for name in BottleneckSettings.model_fields if name in {
    "mh_adapter", "output_adapter", "reduction_factor", "non_linearity", "is_parallel", "scaling", "original_ln_before",
    "original_ln_after", "residual_before_ln", "adapter_residual_before_ln", "ln_before", "ln_after", "init_weights",
    "leave_out", "dropout",
})  # fmt: skip
_WITHOUT_MEANING = {
    "architecture", "init_weights_seed", "inv_adapter_reduction_factor", "phm_dim", "factorized_phm_W", "shared_W_phm",
    "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range", "learn_phm", "hypercomplex_nonlinearity",
    "phm_rank", "phm_bias", "stochastic_depth",
}  # fmt: skip
"""Fields of what is refused below, of the start, and of training alone."""
_REFUSED = {
    "phm_layer": "Compacter's hypercomplex layers",
    "inv_adapter": "invertible adapters on the embedding",
    "cross_adapter": "cross attention, which a causal language model does not have",
    "use_gating": "a gate averaged over the whole text, which would let the future speak into the past",
}
_OTHERWISE = ("phi", "gemma2", "gemma3_text")
"""Families where `adapters` computes what reads the stream in another way than in its other decoder models."""


def is_adapterhub(fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is AdapterHub's."""
    return "peft_type" not in fields and isinstance(fields.get("config"), dict)


def to_fields(
    config: BottleneckSettings, tensors: Mapping[str, torch.Tensor], base_name: str, revision: str | None
) -> Any:
    """The content of adapter_config.json."""
    own = {name: getattr(config, name) for name in _OWN}
    others = {name: None if name == "inv_adapter" else False for name in _REFUSED}
    up_DM = next(value for name, value in tensors.items() if name.endswith("adapter_up.weight"))
    return {
        "config": {**others, **own, "leave_out": list(config.leave_out)},
        "hidden_size": len(up_DM),
        "model_name": os.path.abspath(base_name) if os.path.isdir(base_name) else base_name,
        "model_revision": revision,
        "name": NAME,
        "version": "adapters.1.3.0",
        "written_by": "lowrank",
    }


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """The tensors under AdapterHub's names."""
    named = {}
    for name, value in tensors.items():
        place, part = _split(name)
        named[f"{place}.adapters.{NAME}.{part}"] = value
        if part.startswith("adapter_norm_before."):  # it is a step of the way down too
            named[f"{place}.adapters.{NAME}.adapter_down.0.{part.rpartition('.')[2]}"] = value
    write_tensors(path, named, dtype)


def read(
    folder: Path, fields: Mapping[str, Any], read_file: Callable[[Path], dict[str, torch.Tensor]]
) -> tuple[Any, dict[str, torch.Tensor], str | None, str | None]:
    """(settings, tensors by the bank's names, base, revision). ModelError with all that cannot be used.

    `read_file`: how a safetensors file is read: whole, or its header."""
    described, problems = fields["config"], []
    kind = described.get("architecture")
    if kind is not None:
        problems.append(f"config.architecture is {kind!r}; of AdapterHub's adapters lowrank reads bottleneck adapters")
        raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
    problems += [f"config.{name}: {what} are not there" for name, what in _REFUSED.items() if described.get(name)]
    known = {*_OWN, *_WITHOUT_MEANING, *_REFUSED}
    problems += [
        f"config.{name}: {described[name]!r} is not known"
        for name in sorted(described.keys() - known)
        if described[name]
    ]
    config = _settings(described, problems)
    reads_stream = config is not None and config.reads_stream
    if fields.get("model_type") in _OTHERWISE and reads_stream and "written_by" not in fields:
        problems.append(f"model_type {fields['model_type']}: `adapters` hands its adapters another stream than here")
    for key in ("model_name", "model_revision"):
        if not isinstance(fields.get(key), (str, type(None))):
            problems.append(f"{key}: {fields[key]!r} is no text")
    raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
    tensors = _named(read_file(_tensor_file(folder)), problems)
    raise_all(ModelError, f"{folder}: this adapter cannot be used", problems)
    assert config is not None
    return config, tensors, fields.get("model_name") or None, fields.get("model_revision")


def _settings(described: Mapping[str, Any], problems: list[str]) -> Any:
    """The variant whose defaults are nearest, with all that it says."""
    given = {name: described[name] for name in _OWN if described.get(name) is not None}
    parallel, behind_attention = bool(given.get("is_parallel")), bool(given.get("mh_adapter"))
    variant = _VARIANTS["parallel" if parallel else "houlsby" if behind_attention else "pfeiffer"]
    hub_defaults = {"mh_adapter": False, "output_adapter": False, "original_ln_before": False, "is_parallel": False,
                    "scaling": 1.0, "init_weights": "bert"}  # fmt: skip
    settings = {**hub_defaults, **given}
    try:
        return variant.model_validate(settings)
    except ValidationError as error:
        problems += [f"config.{line}" for line in error_lines(error, settings, variant)]
    return None


def _tensor_file(folder: Path) -> Path:
    """Of a pickle nothing is opened: what opens it may run."""
    path = folder / TENSOR_FILE
    if os.path.lexists(path):
        return path
    if (folder / PICKLE).is_file():
        raise ModelError(
            f"{folder / PICKLE}: a pickle, which can run code when it is opened; lowrank does not. If you trust it, "
            "load it with `adapters` and save_adapter(..., use_safetensors=True) it again"
        )
    raise ModelError(f"{folder}: no {TENSOR_FILE} in it")


def _named(stored: Mapping[str, torch.Tensor], problems: list[str]) -> dict[str, torch.Tensor]:
    """By the bank's names, in float32 or wider."""
    found: dict[str, torch.Tensor] = {}
    names: set[str] = set()
    for name, value in stored.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            problems.append(f"{name}: no tensor of a bottleneck adapter")
            continue
        names.add(match["name"])
        found[f"{match['place']}.{match['part']}"] = value.float() if value.dtype.itemsize < 4 else value
    if len(names) > 1:
        problems.append(f"{TENSOR_FILE} holds {len(names)} adapters ({', '.join(sorted(names)[:3])}), expected one")
    for name in [name for name in found if ".adapter_norm_before." in name]:
        found.pop(name.replace(".adapter_norm_before.", ".adapter_down.0."), None)
    if not found and not problems:
        problems.append(f"{TENSOR_FILE} holds no tensor of an adapter")
    return found


def _split(name: str) -> tuple[str, str]:
    """(place, the rest) of a name of the bank's."""
    kind = "output_adapters" if ".output_adapters." in name else "attention_adapters"
    place, _, part = name.partition(f".{kind}.")
    return f"{place}.{kind}", part
