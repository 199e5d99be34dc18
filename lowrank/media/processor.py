"""Pictures as a model reads them: what stands for one in its text, and its pixels.

Both come from the model's own processor, whose unit is the document: some families cut a picture in tiles only where it
is alone. The counts need no decoding: what stands for pictures depends on their sizes, so blank ones of the same sizes
are asked about, and each document's sizes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError
from lowrank.foreign_files import read_json
from lowrank.media.decoding import blank, decoded
from lowrank.media.limits import MAX_PIXELS, MIN_PIXELS
from lowrank.records import Picture

_ATTRIBUTE = "picture_processor"
_PLAIN = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""What of a processor's work does not change how many tokens there are."""
_SIZES_KEPT = 100_000


class PictureProcessor:
    """The processor of the checkpoint at `path`; nothing is loaded before the first picture."""

    def __init__(
        self,
        path: str,
        revision: str | None,
        tokenizer: Any,
        max_pixels: int = MAX_PIXELS,
        min_pixels: int = MIN_PIXELS,
    ) -> None:
        self._path, self._revision, self._tokenizer = path, revision, tokenizer
        self.max_pixels, self.min_pixels = max_pixels, min_pixels
        self._known: dict[tuple[tuple[int, int], ...], tuple[str, ...]] = {}

    @cached_property
    def sees(self) -> bool:
        """Whether the model has a tower for pictures, and files that say how to make them ready for it."""
        files = ("preprocessor_config.json", "processor_config.json")
        return "vision_config" in self._config and any(self._file(name) for name in files)

    @cached_property
    def own(self) -> Any:
        """transformers' processor. ModelError where it cannot be made."""
        from lowrank.media.loading import load_processor  # seconds of imports, for rows with pictures alone

        return load_processor(self._path, self._revision, self._tokenizer, self._config.get("model_type"))

    @property
    def placeholder(self) -> str:
        """What the model's chat template writes for a picture."""
        return self.own.image_token

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
        """What stands for each picture of a document, by their (width, height). ModelError in the processor's words
        for sizes that it refuses."""
        shown = tuple(self.resized(*size) for size in sizes)
        if shown not in self._known:
            if len(self._known) >= _SIZES_KEPT:
                self._known.clear()
            processed = self._processed([blank(size) for size in shown], **_PLAIN)
            (found,) = processed["text_replacement_offsets"]
            self._known[shown] = tuple(each["replacement"] for each in found)
        return self._known[shown]

    def inputs(self, pictures: Sequence[Picture]) -> dict[str, torch.Tensor]:
        """The tensors of a document's pictures that its model reads: `pixel_values` and what its family has beside.

        DataError for a picture that cannot be decoded (any more).
        """
        images = [decoded(picture, self.resized(picture.width, picture.height)) for picture in pictures]
        processed = self._processed(images)
        return {name: value for name, value in processed.items() if isinstance(value, torch.Tensor)}

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the limits of pixels, as LLaMA-Factory makes them."""
        for limit, beyond in ((self.max_pixels, width * height > self.max_pixels),
                              (self.min_pixels, width * height < self.min_pixels)):  # fmt: skip
            if beyond:
                factor = math.sqrt(limit / (width * height))
                width, height = max(1, int(width * factor)), max(1, int(height * factor))
        return width, height

    def _processed(self, images: list[Any], **options: Any) -> Any:
        own = self.own
        try:
            return own(
                images=[images],  # of one document
                text=[own.image_token * len(images)],
                return_text_replacement_offsets=True,
                return_tensors="pt",
                **options,
            )
        except Exception as error:  # whatever transformers makes of a size it was not made for
            detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise ModelError(f"{sizes} pixels: {detail}") from error

    @cached_property
    def _config(self) -> dict[str, Any]:
        place = self._file("config.json")
        return read_json(place) if place else {}

    def _file(self, name: str) -> Path | None:
        found = cached_file(
            self._path, name, revision=self._revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return Path(found) if found else None


def attach(tokenizer: Any, processor: PictureProcessor) -> None:
    """Let whoever has the tokenizer find the processor of the same checkpoint."""
    setattr(tokenizer, _ATTRIBUTE, processor)


def processor_of(tokenizer: Any) -> PictureProcessor | None:
    """The processor that was attached; None where there is none."""
    return getattr(tokenizer, _ATTRIBUTE, None)
