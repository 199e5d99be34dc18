"""PEFT's AdaLoRA files, read as the LoRA that computes the same.

P diag(E) Q is LoRA with the numbers of E multiplied into A, a rank for every layer, and alphas that keep the scale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lowrank.errors import ModelError

KIND = "ADALORA"
_OF_TRAINING = (
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
)  # fmt: skip
_PREFIX = "base_model.model."


def as_lora(fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(adapter_config.json, tensors) of the LoRA that computes the same. ModelError if a layer lacks a part."""
    start, alpha = fields.get("init_r") or 12, fields.get("lora_alpha") or 8
    scale = (alpha if alpha > 0 else start) / (start + 1e-5)
    modules = [name.removesuffix(".lora_E") for name in tensors if name.endswith(".lora_E")]
    parts = {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_E", "lora_B")}
    missing = sorted(parts - tensors.keys())
    if missing:
        raise ModelError(f"an AdaLoRA adapter without {', '.join(missing[:3])}")
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    ranks: dict[str, int] = {}
    for module in modules:
        A_RD = tensors[f"{module}.lora_A"] * tensors[f"{module}.lora_E"]
        if len(A_RD):  # a layer may have lost all of its ranks
            found |= {f"{module}.lora_A.weight": A_RD, f"{module}.lora_B.weight": tensors[f"{module}.lora_B"]}
            ranks[f"^{re.escape(module.removeprefix(_PREFIX))}"] = len(A_RD)
    kept = {name: value for name, value in fields.items() if name not in _OF_TRAINING}
    patterns = {"rank_pattern": ranks, "alpha_pattern": {name: scale * rank for name, rank in ranks.items()}}
    return {**kept, **patterns, "peft_type": "LORA", "r": start, "lora_alpha": alpha}, found
