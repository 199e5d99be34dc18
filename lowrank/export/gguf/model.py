"""A model as the converter reads it: its configuration, the shapes of its tensors, and any tensor when it is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from lowrank.errors import ModelError
from lowrank.export.merge.merged import Merged
from lowrank.export.merge.tensor_names import Names
from lowrank.export.merge.weights import Weights
from lowrank.export.source import Source
from lowrank.export.writing.side_files import write_side_files
from lowrank.foreign_files import read_json
from lowrank.models.layers import is_outside, language_model
from lowrank.models.loading.model_class import is_composite
from lowrank.models.loading.quiet import quiet_transformers
from lowrank.models.loading.tokenizer import FILE_FAULTS
from lowrank.models.native_masks import prompt_type_of


@dataclass(frozen=True)
class SourceModel:
    """`shapes` and `dtypes` by the names in the checkpoint's files; `tensor(name)`: its values. Of a composite model it
    is the language model, under the names of a checkpoint that holds nothing else."""

    folder: Path
    """With config.json and the tokenizer."""
    name: str
    config: dict[str, Any]
    """Of the text model, with every key that transformers fills in by default."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    tensor: Callable[[str], torch.Tensor]
    named: Callable[[str], str | None] = str
    """The name here of a parameter of transformers' model; None: it is not here."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Parts of a composite model that are not here, and how many tensors each has: towers for pictures or sound."""
    beside: SourceModel | None = None
    """Those parts: their tensors under the names of the checkpoint's files, the configuration of the whole model."""

    @property
    def architecture(self) -> str:
        """The class that the whole model's config.json names, which is what llama.cpp's own converter goes by."""
        whole = read_json(self.folder / "config.json")
        return (whole.get("architectures") or self.config.get("architectures") or [self.model_type])[0]

    @property
    def vision(self) -> str | None:
        """transformers' name of the tower for pictures, of a composite model that has one."""
        return (self.config.get("vision_config") or {}).get("model_type")

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.config["model_type"]


def read_folder(folder: Path) -> SourceModel:
    """A model folder; its weights are not read yet. Raises ModelError: files missing or damaged."""
    files = Weights(folder)
    shapes = {name: entry.shape for name, entry in files.items()}
    dtypes = {name: entry.dtype for name, entry in files.items()}
    config = read_config(folder)
    config.pop("quantization_config", None)  # they come unpacked
    model = SourceModel(folder, folder.resolve().name, config, shapes, dtypes, lambda name: files[name].read())
    return _language_part(model, Names(folder, files)) if _is_composite(folder) else model


def read_merged(source: Source, folder: Path) -> SourceModel:
    """Base and adapter as one model, merged in float32 as its tensors are asked for.

    Its configuration, tokenizer and chat template are written to `folder`, which must last as long.
    """
    merged = Merged(source)
    write_side_files(source, folder, untied=merged.untied)

    def tensor(name: str) -> torch.Tensor:
        return merged.tensor(name, None if merged[name].change is None else torch.float32)

    shapes = {name: plan.shape for name, plan in merged.items()}
    dtypes = {name: plan.dtype if plan.change is None else torch.float32 for name, plan in merged.items()}
    model = SourceModel(folder, source.name, read_config(folder), shapes, dtypes, tensor)
    if not _is_composite(folder):
        return model
    return _language_part(model, Names(source.base, merged.checkpoint), untied=merged.untied)


def _language_part(model: SourceModel, names: Names, *, untied: bool = False) -> SourceModel:
    """The language model of a composite one, its tensors named as in a checkpoint of its own; see
    `SourceModel.left_out`. Raises ModelError for a prefix language model."""
    if prompt_type_of(names.model) is not None:
        raise ModelError(
            f"{model.name}: a GGUF file of this model would answer otherwise: it reads prompts both ways (a prefix "
            "language model), and llama.cpp reads from left to right; serve it from its merged checkpoint (--to merged)"
        )
    text = names.model.config.get_text_config()
    language, _ = language_model(names.model)
    head = names.model.get_output_embeddings()
    heads = {name for name, module in names.model.named_modules() if module is head}
    own = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    prefix = getattr(own, "base_model_prefix", "model")

    def named(parameter: str) -> str | None:
        """None for what is outside of the language model."""
        module, _, last = parameter.rpartition(".")
        if module in heads:
            return f"lm_head.{last}"
        return None if is_outside(parameter, language) else f"{prefix}{parameter.removeprefix(language)}"

    becomes = names.parameters
    found = {name: named(becomes.get(name, name)) for name in model.shapes}
    file_of = {plain: name for name, plain in found.items() if plain is not None}
    above = language.rpartition(".")[0]
    outside = [becomes.get(name, name).removeprefix(f"{above}.") for name, plain in found.items() if plain is None]
    counts = Counter(name.partition(".")[0] for name in outside)
    towers = [name for name, plain in found.items() if plain is None]
    beside = replace(
        model,
        config=names.model.config.to_dict(),
        shapes={name: model.shapes[name] for name in towers},
        dtypes={name: model.dtypes[name] for name in towers},
    )
    return replace(
        model,
        config={
            **model.config,
            "tie_word_embeddings": bool(names.tied) and not untied,
            "vision_config": names.model.config.to_dict().get("vision_config"),
        },
        shapes={plain: model.shapes[name] for plain, name in file_of.items()},
        dtypes={plain: model.dtypes[name] for plain, name in file_of.items()},
        tensor=lambda plain: model.tensor(file_of[plain]),
        named=named,
        left_out=dict(counts),
        beside=beside if towers else None,
    )


def _is_composite(folder: Path) -> bool:
    with quiet_transformers():
        return is_composite(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in."""
    with quiet_transformers():
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().to_dict()
        except FILE_FAULTS as error:
            raise ModelError(f"{folder}: transformers does not know this config.json: {error}") from error
