"""The second file of a model that sees or hears: its towers and what stands between them and the language model, by
llama.cpp's own converter (`--mmproj`).

llama.cpp reads it beside the language model's file. The converter knows fewer towers than language models, and finds
some of what it cannot do only when it reads the weights; whoever has not asked for this file by name gets the language
model without it then, and a sentence that says why.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from lowrank.errors import ModelError
from lowrank.export import Install
from lowrank.export.gguf.model import SourceModel
from lowrank.export.gguf.upstream import Upstream, names_for
from lowrank.export.merge.merged import Merged
from lowrank.export.source import Source
from lowrank.export.writing.shards import Layout, num_bytes, write_shards
from lowrank.models.loading.checkpoint_files import SINGLE

Wanted = bool | Literal["auto"]
_CHECK_IT = "gguf.mmproj"
_READ_WRONG = {
    "clip_vision_model": "llama.cpp computes towers of CLIP (LLaVA 1.5) otherwise than they were trained: it puts the "
    "class token last (ggml-org/llama.cpp issue 25814)"
}
"""Of towers that nobody should be given, by transformers' `model_type`."""
_BITS = {"f32": 32, "f16": 16, "bf16": 16}


class TowerFile:
    """What becomes of the towers of one model. `beside`: them (Model.beside); `wanted`: the setting gguf.mmproj."""

    def __init__(
        self, source: Source, model: SourceModel, beside: SourceModel, wanted: Wanted, upstream: Upstream
    ) -> None:
        """Raises ModelError for a tower that is asked for by name and cannot be."""
        self._source, self._model, self._beside = source, model, beside
        self._wanted, self._upstream = wanted, upstream
        self._architecture = model.architecture  # the model's folder may be gone when this is asked for
        self._vision = beside.vision
        self.missing: str | None = None
        """Why there is no file, in words."""
        if wanted is False:
            self.missing = f"{_CHECK_IT} is false"
        elif self._vision in _READ_WRONG:
            self._refuse(_READ_WRONG[self._vision])
        elif upstream.is_here:
            self._check()
        else:
            self._announcement = upstream.announcement("the tower's file is written by llama.cpp's converter")

    @property
    def installs(self) -> tuple[Install, ...]:
        """What is to be fetched."""
        if self.missing or self._upstream.is_here:
            return ()

        def make() -> None:
            try:
                self._upstream.fetch()
            except ModelError as error:
                self._refuse(str(error))
            else:
                self._check()

        return (Install(self._announcement, make),)

    def note(self) -> str:
        """What is and what is not written, for the user."""
        parts = ", ".join(f"{name} ({count} tensors)" for name, count in self._model.left_out.items())
        if self.missing is None:
            return f"two files: the language model, and for llama.cpp's --mmproj {parts}"
        return f"the file holds the language model alone and reads text only: without {parts}; {self.missing}"

    def num_bytes(self, kind: str) -> int:
        """On the disk, with what lies there between."""
        if self.missing:
            return 0
        weights = sum(math.prod(shape) for shape in self._beside.shapes.values())
        between = sum(
            math.prod(shape) * self._beside.dtypes[name].itemsize for name, shape in self._beside.shapes.items()
        )
        return weights * _BITS[kind] // 8 + between

    def write(self, side: Path, path: Path, kind: str) -> None:
        """From `side`, which has the model's configuration and its processor's files, and its weights or none. What
        fails is `missing` then; ModelError where the file was asked for by name."""
        if self.missing:
            return
        own = not list(side.glob("*.safetensors"))
        try:
            if own:
                self._write_weights(side / SINGLE)
            self._upstream.convert(side, path, kind, self._source.name, tower=True)
            if not path.is_file():
                raise ModelError(f"{self._upstream.name} wrote nothing")
        except ModelError as error:
            path.unlink(missing_ok=True)
            self._refuse(str(error))
        finally:
            if own:
                (side / SINGLE).unlink(missing_ok=True)

    def _check(self) -> None:
        try:
            known = self._upstream.knows_tower(self._architecture)
        except ModelError as error:
            self._refuse(str(error))
            return
        if not known:
            self._refuse(f"{self._upstream.name} does not know the tower of {self._architecture}")

    def _refuse(self, reason: str) -> None:
        if self._wanted is True:
            raise ModelError(
                f"{_CHECK_IT}: true, and the tower's file cannot be written: {reason}\n"
                f"  leave {_CHECK_IT} out for the language model alone, or serve the merged checkpoint (--to merged)"
            )
        self.missing = reason

    def _write_weights(self, path: Path) -> None:
        """Of the towers alone, merged, each in the dtype of the base."""
        merged = Merged(self._source)
        names = tuple(name for name in merged if name in self._beside.shapes)
        layout = Layout(((path.name, names),), sum(num_bytes(merged[name], None) for name in names))
        write_shards(
            merged, layout, None, path.parent, lambda done, total, what="": None, named=names_for(self._vision)
        )
