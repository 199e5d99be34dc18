"""What the converter needs of a model: its configuration, its tensors' shapes, and any tensor when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lowrank.errors import ModelError
from lowrank.export.merge import Merged
from lowrank.export.side_files import write_side_files
from lowrank.export.source import Source
from lowrank.export.weights import Weights
from lowrank.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Model:
    """`shapes` and `dtypes` by the names in the checkpoint's files; `tensor(name)`: its values."""

    folder: Path
    """With config.json and the tokenizer."""
    name: str
    config: dict[str, Any]
    """Of the text model, with every key that transformers fills in by default."""
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    tensor: Callable[[str], torch.Tensor]

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return self.config["model_type"]


def read_folder(folder: Path) -> Model:
    """A model folder; its weights are not read yet. Raises ModelError: files missing or damaged."""
    files = Weights(folder)
    shapes = {name: entry.shape for name, entry in files.items()}
    dtypes = {name: entry.dtype for name, entry in files.items()}
    config = read_config(folder)
    config.pop("quantization_config", None)  # they come unpacked
    return Model(folder, folder.resolve().name, config, shapes, dtypes, lambda name: files[name].read())


def read_merged(source: Source, folder: Path) -> Model:
    """Base and adapter as one model, merged in float32 as its tensors are asked for.

    Its configuration, tokenizer and chat template are written to `folder`, which must last as long.
    """
    merged = Merged(source)
    write_side_files(source, folder, untied=merged.untied)

    def tensor(name: str) -> torch.Tensor:
        return merged.tensor(name, None if merged[name].change is None else torch.float32)

    shapes = {name: plan.shape for name, plan in merged.items()}
    dtypes = {name: plan.dtype if plan.change is None else torch.float32 for name, plan in merged.items()}
    return Model(folder, source.name, read_config(folder), shapes, dtypes, tensor)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json with transformers' defaults filled in."""
    with quiet_transformers():
        try:
            return transformers.AutoConfig.from_pretrained(folder).get_text_config().to_dict()
        except (ValueError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: transformers does not know this config.json: {error}") from error
