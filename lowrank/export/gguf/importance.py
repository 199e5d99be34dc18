"""Which input channels of each matrix matter, measured on texts: so that few bits go where they count.

What llama.cpp calls an importance matrix: the mean square of every input channel over the tokens of the texts. It is
measured on base + adapter in transformers; experts, the embedding and the head have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank.errors import DataError
from lowrank.export.gguf.convert import ConversionPlan, part_shape, tensor_names
from lowrank.export.source import Source
from lowrank.export.verify.readers import read_adapter
from lowrank.kernels.accelerators import wide
from lowrank.segments import Segment, unweighted

CHUNK = 512
"""Tokens read at once."""
MOST = 16384
"""Tokens read in all: more do not help consistently (llama.cpp's tools/perplexity/README.md)."""


DATA = "data"
"""Instead of a file: rows that the model was trained on."""


def documents_for(source: Source, requested: str | None, *, needed: bool) -> list[Segment]:
    """What to measure on: a text file (`requested`), rows the model was trained on (DATA, or where a type needs it and
    nothing was asked), else nothing. Raises DataError.
    """
    if requested is not None and requested != DATA:
        try:
            return cut(source, Path(requested).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"gguf.importance: {requested} cannot be read: {error}") from error
    if requested is None and not needed:
        return []
    rows = [] if source.documents is None else list(source.documents(MOST // 64))
    if requested == DATA and not rows:
        raise DataError("gguf.importance=data: the rows it was trained on are not at hand; name a text file")
    lengths = np.cumsum([len(row) for row in rows])
    return rows[: int(np.searchsorted(lengths, MOST)) + 1] if rows else []


def cut(source: Source, text: str) -> list[Segment]:
    """A text, or its first MOST tokens, as documents of CHUNK tokens. Raises DataError for one that is too short."""
    encoded = source.tokenizer(text[: 8 * MOST], add_special_tokens=False, verbose=False).input_ids
    tokens = np.asarray(encoded[:MOST], dtype=np.int64)
    if len(tokens) < CHUNK:
        raise DataError(f"the text for the importance matrix has {len(tokens)} tokens; at least {CHUNK} are needed")
    return [unweighted(tokens[start : start + CHUNK]) for start in range(0, len(tokens), CHUNK)]


def measure(source: Source, made: ConversionPlan, documents: Sequence[Segment]) -> dict[str, np.ndarray]:
    """Mean squares by the names in the GGUF file, (D) float32 each; of documents with their pictures."""
    squares: dict[str, torch.Tensor] = {}
    count = sum(map(len, documents))

    def listen(names: list[str]) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            del module
            square_D = wide(given[0].detach().reshape(-1, given[0].shape[-1])).square().sum(0).cpu()
            for name in names:
                squares[name] = squares.get(name, torch.zeros(())) + square_D

        return hook

    with read_adapter(source, source.adapter) as reader:
        reader.take_media_of(documents)  # before anybody listens
        handles = []
        for name, module in reader.base.model.named_modules():
            names = _names(made, f"{name}.weight", getattr(module, "in_features", None))
            if names:
                handles.append(module.register_forward_pre_hook(listen(names)))
        for document in documents:
            reader.logprobs_shown(document, rows=1)
        for handle in handles:
            handle.remove()
    return {name: (square_D / count).float().numpy() for name, square_D in squares.items()}


def _names(made: ConversionPlan, weight: str, width: int | None) -> list[str]:
    """The tensors of the file whose rows this layer's input meets."""
    model = made.model
    own = model.named(weight)
    if width is None or own not in model.shapes:
        return []
    names = tensor_names(made.family.arch, model.config)
    parts = made.family.parts(model.config, own) or []
    found = [names(part.name) for part in parts if part_shape(model, part)[-1] == width]
    return [name for name in found if name is not None]
