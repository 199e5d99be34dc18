"""A LoRA adapter as a GGUF file that llama.cpp loads over the base's file, at run time and beside others.

llama.cpp multiplies every pair by alpha / rank with one alpha for the file, which is wrong for rank-stabilized
LoRA and where modules differ in rank or alpha. With an alpha of 0 it multiplies by nothing, so the scale goes into B.
Rows of B follow the rows of the weight (pieces.py). A is (R, D), B (O, R); an embedding's A is (V, R), its B (D, R).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.checkpoints.atomic import new_file
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError, raise_all
from lowrank.export.gguf.convert import ConversionPlan, tensor_names
from lowrank.export.gguf.writer import TensorEntry, fields_of, library, write_file

MERGE = "take the merged model instead: lowrank export --to gguf"
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def adapter_incompatibility(base: ConversionPlan, adapter: AdapterOnDisk) -> list[str]:
    """Why llama.cpp could not apply this adapter at run time, one sentence each; empty: it can."""
    problems = []
    kind = adapter.config.type
    if kind not in ("lora", "rslora"):
        problems.append(f"a {kind} adapter is more than a product of two matrices")
    problems += [f"{name} was trained whole (modules_to_save)" for name in adapter.copies]
    problems += [
        f"{name}: llama.cpp adapts products of two matrices only"
        for name in adapter.tensors
        if not name.endswith(_PARTS) and not any(name.startswith(f"{copy}.") for copy in adapter.copies)
    ]
    for module in adapter.targets:
        reason = _module_incompatibility(base, module)
        if reason:
            problems.append(f"{module}: {reason}")
    return problems


def _module_incompatibility(base: ConversionPlan, module: str) -> str | None:
    tied = base.model.config.get("tie_word_embeddings")
    if tied and module.endswith(("lm_head", "embed_tokens", "wte", "word_embeddings")):
        return "embedding and head are one tensor in the file, and llama.cpp ends at an assertion"
    if ".experts" in module:
        return "experts are one tensor in the file"
    weight = base.model.named(f"{module}.weight")
    if weight is None:
        return "it is outside of the language model, which is all that a GGUF file holds"
    if weight not in base.model.shapes:
        return "the base has no such tensor"
    parts = base.family.parts(base.model.config, weight)
    if parts is None or len(parts) != 1:
        return "this layer is several tensors in the file"
    name = tensor_names(base.family.arch, base.model.config)(parts[0].name)
    return None if name else "this layer has no place in the file"


def write_adapter_file(base: ConversionPlan, adapter: AdapterOnDisk, path: Path) -> None:
    """Write the adapter to `path`, in float32. Raises ModelError with every reason why it cannot be."""
    problems = adapter_incompatibility(base, adapter)
    raise_all(ModelError, f"this adapter cannot be a GGUF file of its own; {MERGE}", problems)
    names = tensor_names(base.family.arch, base.model.config)
    variant: Any = adapter.config.build()
    arrays: dict[str, np.ndarray] = {}
    for module, (rank, alpha) in sorted(adapter.targets.items()):
        weight = base.model.named(f"{module}.weight")
        assert weight is not None, "refused above"
        part = (base.family.parts(base.model.config, weight) or [])[0]
        name = names(part.name)
        scale = variant.scale(rank, alpha)
        if f"{module}.lora_embedding_A" in adapter.tensors:
            left = adapter.tensors[f"{module}.lora_embedding_A"].T
            right = adapter.tensors[f"{module}.lora_embedding_B"] * scale
        else:
            left = adapter.tensors[f"{module}.lora_A.weight"]
            right = adapter.tensors[f"{module}.lora_B.weight"] * scale
            right = right[_row_order(part.make, len(right))]
        arrays[f"{name}.lora_a"] = left.float().contiguous().numpy()
        arrays[f"{name}.lora_b"] = right.float().contiguous().numpy()
    kind = library().GGMLQuantizationType.F32
    entries = [TensorEntry(name, array.shape, kind) for name, array in arrays.items()]
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    with new_file(path) as partial:
        write_file(partial, fields_of(base.family.arch, fields), entries, (iter([each]) for each in arrays.values()))


def _row_order(make: Any, rows: int) -> torch.Tensor:
    """Which row of the weight comes where. A layer kept as (in, out) is only turned: its rows stay in order."""
    return make(torch.arange(rows)[:, None]).reshape(-1)
