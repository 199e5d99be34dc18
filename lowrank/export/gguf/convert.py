"""A checkpoint folder to a GGUF file: names, order of rows, header, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.checkpoints.atomic import new_file
from lowrank.errors import ModelError, did_you_mean, raise_all
from lowrank.export.gguf.families import families
from lowrank.export.gguf.model import SourceModel, read_folder
from lowrank.export.gguf.pieces import Family, Part, all_parts
from lowrank.export.gguf.vocabulary import read_vocabulary
from lowrank.export.gguf.writer import CHUNK, TensorEntry, fields_of, library, write_file

PLAIN_TYPES = ("f32", "f16", "bf16", "q8_0")
"""What the converter writes by itself; all others are made from one of these (quantize.py)."""

FLOAT32_NAMES = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight")
"""Tensors that stay in float32 whatever the file's type: small, and everything hangs on them."""


@dataclass(frozen=True)
class ConversionPlan:
    """All that is decided before any weight is read."""

    model: SourceModel
    family: Family
    fields: dict[str, Any]
    parts: list[tuple[str, Part]]
    """GGUF name and origin of every tensor but the extra ones."""
    extra: dict[str, torch.Tensor]
    notes: list[str] = field(default_factory=list)


def plan(model: SourceModel) -> ConversionPlan:
    """Decide everything. Raises ModelError for what cannot be converted, with every reason."""
    known = families()
    folder, kind, config = model.name, model.model_type, model.config
    family = known.get(kind)
    if family is None:
        raise ModelError(
            f"{folder}: lowrank cannot write {kind!r} models to GGUF{did_you_mean(kind, known)}\n"
            f"  it knows: {', '.join(known)}. Serve it from its merged checkpoint, or use llama.cpp's own converter"
        )
    problems = family.refuse(config)
    activation = config.get("hidden_activation") or config.get("hidden_act") or config.get("activation_function")
    activation = activation or config.get("activation")
    if activation and activation not in family.activations:
        problems.append(f"activation {activation!r} (llama.cpp computes {family.activations[0]})")
    raise_all(ModelError, f"{folder}: llama.cpp would compute this {kind} model otherwise than transformers", problems)
    vocabulary = read_vocabulary(model.folder, _vocabulary_size(model))
    header = {f"{family.arch}.{key}": value for key, value in family.fields(config).items()}
    fields = {"general.type": "model", "general.name": model.name, **header, **vocabulary.fields}
    notes = [*family.notes(config), *vocabulary.notes]
    return ConversionPlan(model, family, fields, _named_parts(model, family), family.extra(config), notes)


def _vocabulary_size(model: SourceModel) -> int:
    """Rows of the embedding."""
    for name, shape in model.shapes.items():
        if name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight")):
            return shape[0]
    raise ModelError(f"{model.name}: no embedding among the tensors; is it a whole model?")


def _named_parts(model: SourceModel, family: Family) -> list[tuple[str, Part]]:
    names = tensor_names(family.arch, model.config)
    tied = model.config.get("tie_word_embeddings")
    wanted = [name for name in model.shapes if not _is_dropped(name) and not (tied and "lm_head." in name)]
    found, unknown = [], []
    for part in all_parts(family, model.config, wanted):
        name = names(part.name)
        if name is None:
            unknown.append(f"{part.name} {model.shapes[part.sources[0]]}")
        else:
            found.append((name, part))
    raise_all(ModelError, f"{model.name}: tensors that have no place in a GGUF file of {family.arch!r}", unknown)
    return found


def _is_dropped(name: str) -> bool:
    """Buffers that older versions of transformers saved."""
    return name.endswith((".attention.masked_bias", ".attention.bias", "rotary_emb.inv_freq"))


def tensor_names(arch: str, config: dict[str, Any]) -> Callable[[str], str | None]:
    """A function from a checkpoint's tensor name (of any family that `gguf` knows) to that of the GGUF file."""
    gguf = library()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = config.get("num_hidden_layers") or config["n_layer"]
    table = gguf.get_tensor_name_map(numbers[arch], blocks)

    def name_of(name: str) -> str | None:
        return table.get_name(name, try_suffixes=(".weight", ".bias"))

    return name_of


def natural_type(model: SourceModel) -> str:
    """The smallest type that keeps every weight as it is."""
    kinds = {model.dtypes[name] for name, shape in model.shapes.items() if len(shape) > 1}
    return {frozenset({torch.bfloat16}): "bf16", frozenset({torch.float16}): "f16"}.get(frozenset(kinds), "f32")


def convert(
    folder: Path, path: Path, kind: str = "auto", progress: Callable[[int, int], None] | None = None
) -> ConversionPlan:
    """Write the model in `folder` to `path` as `kind` (one of PLAIN_TYPES; `auto`: no weight changes).

    Memory: the largest tensor as saved, and 64 MB. `progress(bytes written, bytes in all)`. Raises ModelError.
    """
    made = plan(read_folder(folder))
    write_plan(made, path, natural_type(made.model) if kind == "auto" else kind, progress)
    return made


def write_plan(made: ConversionPlan, path: Path, kind: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Write what was planned."""
    if kind not in PLAIN_TYPES:
        raise ModelError(f"the converter writes {', '.join(PLAIN_TYPES)}, not {kind!r}")
    gguf = library()
    entries = [
        TensorEntry(name, tuple(tensor.shape), gguf.GGMLQuantizationType.F32) for name, tensor in made.extra.items()
    ]
    for name, part in made.parts:
        shape = part_shape(made.model, part)
        entries.append(TensorEntry(name, shape, stored_type(name, shape, kind)))
    total = sum(entry.bytes for entry in entries)
    file_type = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}[kind]
    fields = {
        **made.fields,
        "general.file_type": int(gguf.LlamaFileType[file_type]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }
    written = 0

    def counted(chunks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal written
        for chunk in chunks:
            yield chunk
            written += chunk.nbytes
            if progress is not None:
                progress(written, total)

    with new_file(path) as partial:
        tensors = chain(
            (iter([tensor]) for tensor in made.extra.values()),
            (_tensors(made.model, part) for _, part in made.parts),
        )
        data = (counted(_encoded(each, entry.kind)) for each, entry in zip(tensors, entries))
        write_file(partial, fields_of(made.family.arch, fields), entries, data)


def _tensors(model: SourceModel, part: Part) -> Iterator[torch.Tensor]:
    for source in part.sources:
        yield part.make(model.tensor(source))


def part_shape(model: SourceModel, part: Part) -> tuple[int, ...]:
    """Of the tensor to be, in torch's order."""
    shape = tuple(part.make(torch.empty(model.shapes[part.sources[0]], device="meta")).shape)
    return shape if len(part.sources) == 1 else (len(part.sources), *shape)


def stored_type(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """How a tensor is stored in a file of type `kind`: vectors, norms and routers in float32."""
    types = library().GGMLQuantizationType
    if len(shape) <= 1 or name.endswith(("_norm.weight", *FLOAT32_NAMES)) or not name.endswith(".weight"):
        return types.F32
    wanted = types[kind.upper()]
    block = library().GGML_QUANT_SIZES[wanted][0]
    return types.F16 if shape[-1] % block else wanted


def _encoded(tensors: Iterator[torch.Tensor], kind: Any) -> Iterator[np.ndarray]:
    """Bytes of a tensor, some rows at a time. What torch rounds to it rounds alike, and several times faster."""
    types, quantize = library().GGMLQuantizationType, library().quants.quantize
    by_torch = {types.F32: torch.float32, types.F16: torch.float16}.get(kind)
    for tensor in tensors:
        row_TD = tensor.reshape(-1, tensor.shape[-1])
        step = max(1, CHUNK // tensor.shape[-1])
        for start in range(0, len(row_TD), step):
            rows = row_TD[start : start + step]
            if by_torch is not None:
                yield rows.to(by_torch).contiguous().numpy()
            else:
                yield quantize(rows.float().contiguous().numpy(), kind)
