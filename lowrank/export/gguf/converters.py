"""Chooses what turns a merged model into a GGUF file: lowrank where it knows the family, else llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from lowrank.errors import ModelError
from lowrank.export import Install
from lowrank.export.gguf.convert import plan, write_plan
from lowrank.export.gguf.families import families
from lowrank.export.gguf.importance import measure
from lowrank.export.gguf.model import SourceModel, read_merged
from lowrank.export.gguf.upstream import Upstream, names_for
from lowrank.export.merge.merged import Merged
from lowrank.export.source import Source
from lowrank.export.writing.shards import lay_out, write_shards
from lowrank.segments import Segment

_SHARD = 5 * 10**9


class Converter(Protocol):
    """Writes one model as any of the plain types."""

    model: SourceModel
    """As it is converted; of a composite one the language model, with its towers `beside` it."""
    notes: tuple[str, ...]
    installs: tuple[Install, ...]
    between_bytes: int
    """Of what it needs on the disk besides the file."""

    def write(self, path: Path, kind: str, progress: Callable[[int, int], None]) -> None:
        """The file; `kind` is one of convert.PLAIN_TYPES."""
        ...

    def importance(self, documents: Sequence[Segment]) -> dict[str, np.ndarray]:
        """Of every matrix, by its name in the file."""
        ...


def converter_for(source: Source, side: Path, kinds: tuple[str, ...], own_copy: Path | None) -> Converter:
    """`side`: a folder that lasts as long, for configuration and tokenizer (and the merged model, where one is needed).

    `kinds`: what will be written; `own_copy`: llama.cpp's source, if it is not to be fetched. Raises ModelError.
    """
    model = read_merged(source, side)
    if model.model_type in families():
        return _Own(source, model)
    return _Theirs(source, model, side, torch.float32 if "f32" in kinds else None, Upstream(own_copy))


class _Own:
    installs: tuple[Install, ...] = ()
    between_bytes = 0

    def __init__(self, source: Source, model: SourceModel) -> None:
        self.source = source
        self.plan = plan(model)
        self.model = model
        self.notes = tuple(self.plan.notes)

    def write(self, path: Path, kind: str, progress: Callable[[int, int], None]) -> None:
        write_plan(self.plan, path, kind, progress)

    def importance(self, documents: Sequence[Segment]) -> dict[str, np.ndarray]:
        return measure(self.source, self.plan, documents)


class _Theirs:
    def __init__(
        self, source: Source, model: SourceModel, side: Path, dtype: torch.dtype | None, upstream: Upstream
    ) -> None:
        self.name = source.name
        self.merged = Merged(source)
        self.layout = lay_out(self.merged, dtype, _SHARD)
        self.side, self.dtype, self.upstream = side, dtype, upstream
        self.model = model
        self.between_bytes = self.layout.total_bytes
        self.installs = upstream.installs(model.architecture)
        self.notes = (
            f"{model.model_type} is converted by {upstream.name}, with no test of lowrank's behind it: "
            "what counts is the comparison",
        )

    def write(self, path: Path, kind: str, progress: Callable[[int, int], None]) -> None:
        if not list(self.side.glob("*.safetensors")):
            write_shards(
                self.merged,
                self.layout,
                self.dtype,
                self.side,
                lambda done, total, what="": progress(done, 2 * total),
                named=names_for(self.model.vision),
            )
        progress(1, 2)
        self.upstream.convert(self.side, path, kind, self.name)
        progress(2, 2)

    def importance(self, documents: Sequence[Segment]) -> dict[str, np.ndarray]:
        del documents
        raise ModelError(
            "gguf.importance: lowrank does not know which tensors of this family see which inputs; take a type that "
            "does without (q2_k and larger)"
        )
