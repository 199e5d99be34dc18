"""Pictures and sounds as a model reads them: what stands for one in its text, and the tensors its towers are given.

Both come from the model's own processor, whose unit is the document: some families cut a picture in tiles only where it
is alone. The counts need no decoding: what stands for media depends on their sizes, so blank ones of the same sizes
are asked about, and each document's sizes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError
from lowrank.foreign_files import read_json
from lowrank.media.audio import check_rate, decoded_audio, resampled_length
from lowrank.media.decoding import blank, decoded
from lowrank.media.limits import MAX_PIXELS, MIN_PIXELS
from lowrank.records import KIND_NAMES, Audio, Medium, Picture

_ATTRIBUTE = "media_processor"
_PLAIN = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""What of an image processor's work does not change how many tokens there are."""
_SIZES_KEPT = 100_000
_TOWERS = {"image": "vision_config", "audio": "audio_config"}
"""Where a model's configuration describes what perceives a kind of medium."""
_FILES = ("preprocessor_config.json", "processor_config.json")
_CALLED = {"image": "images", "audio": "audio"}
"""What processors call the media of a kind."""
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

Size = tuple[int, ...]
"""What decides what stands for a medium: (width, height) of a picture, (samples,) of a sound."""


class MediaProcessor:
    """The processor of the checkpoint at `path`; nothing is loaded before the first picture or sound."""

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
        self._known: dict[tuple[tuple[str, Size], ...], tuple[str, ...]] = {}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model has towers for, with files that say how to make them ready."""
        if not any(self._file(name) for name in _FILES):
            return ()
        return tuple(kind for kind, part in _TOWERS.items() if self._config.get(part) is not None)

    @property
    def sees(self) -> bool:
        """Whether the model can be shown pictures."""
        return "image" in self.kinds

    @cached_property
    def own(self) -> Any:
        """transformers' processor. ModelError where it cannot be made."""
        from lowrank.media.loading import load_processor  # seconds of imports, for rows with media alone

        return load_processor(self._path, self._revision, self._tokenizer, self.kinds, self._config.get("model_type"))

    def placeholder(self, kind: str) -> str:
        """What the model's chat template writes for a medium of this kind. ModelError where it has nothing for it."""
        found = getattr(self.own, f"{kind}_token", None)
        if found is None:
            raise ModelError(f"the model's processor has no token that stands for {KIND_NAMES[kind]}")
        return found

    @property
    def rate(self) -> int:
        """Samples in a second of the sounds that the model hears."""
        return int(self.own.feature_extractor.sampling_rate)

    def placeholders(self, media: Sequence[Medium]) -> tuple[str, ...]:
        """What stands for each medium of a document. ModelError in the processor's words for sizes that it refuses."""
        sizes = tuple((each.kind, self._size(each)) for each in media)
        if sizes not in self._known:
            if len(self._known) >= _SIZES_KEPT:
                self._known.clear()
            processed = self._processed([kind for kind, _ in sizes], list(map(_blank, sizes)), blank=True)
            (found,) = processed["text_replacement_offsets"]
            self._known[sizes] = tuple(each["replacement"] for each in found)
        return self._known[sizes]

    def hears_all(self, audio: Audio) -> bool:
        """Whether what stands for a sound would be less, were its last second not there: processors cut off what is
        longer than they were made for."""
        shorter = Audio("", max(1, audio.frames - audio.rate), audio.rate)
        return audio.seconds < 2 or self.placeholders([shorter]) != self.placeholders([audio])

    def inputs(self, media: Sequence[Medium]) -> dict[str, torch.Tensor]:
        """The tensors of a document's media that its model reads: `pixel_values`, `input_features` and what its family
        has beside.

        DataError for a medium that cannot be decoded (any more).
        """
        processed = self._processed([each.kind for each in media], list(map(self._ready, media)))
        return {
            name: value for name, value in processed.items() if isinstance(value, torch.Tensor) and name not in _OF_TEXT
        }

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) within the limits of pixels, as LLaMA-Factory makes them."""
        for limit, beyond in ((self.max_pixels, width * height > self.max_pixels),
                              (self.min_pixels, width * height < self.min_pixels)):  # fmt: skip
            if beyond:
                factor = math.sqrt(limit / (width * height))
                width, height = max(1, int(width * factor)), max(1, int(height * factor))
        return width, height

    def _size(self, medium: Medium) -> Size:
        if isinstance(medium, Picture):
            return self.resized(medium.width, medium.height)
        check_rate(medium, self.rate)
        return (resampled_length(medium, self.rate),)

    def _ready(self, medium: Medium) -> Any:
        if isinstance(medium, Picture):
            return decoded(medium, self.resized(medium.width, medium.height))
        return decoded_audio(medium, self.rate)

    def _processed(self, kinds: Sequence[str], media: Sequence[Any], blank: bool = False) -> Any:
        """What the processor makes of one document that is its media alone."""
        given: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            own = [medium for each, medium in zip(kinds, media) if each == kind]
            given[_CALLED[kind]] = [own] if kind == "image" else own
        if "audio" in kinds:
            given["audio_kwargs"] = {"sampling_rate": self.rate}
        if "image" in kinds and blank:
            given["images_kwargs"] = _PLAIN
        try:
            return self.own(
                text=["".join(map(self.placeholder, kinds))],
                return_text_replacement_offsets=True,
                return_tensors="pt",
                **given,
            )
        except Exception as error:  # whatever transformers makes of a size it was not made for
            detail = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise ModelError(f"{', '.join(map(_described, media))}: {detail}") from error

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


def attach(tokenizer: Any, processor: MediaProcessor) -> None:
    """Let whoever has the tokenizer find the processor of the same checkpoint."""
    setattr(tokenizer, _ATTRIBUTE, processor)


def processor_of(tokenizer: Any) -> MediaProcessor | None:
    """The processor that was attached; None where there is none."""
    return getattr(tokenizer, _ATTRIBUTE, None)


def _blank(sized: tuple[str, Size]) -> Any:
    """A medium of a kind and size that holds nothing."""
    kind, size = sized
    return np.zeros(size, np.float32) if kind == "audio" else blank((size[0], size[1]))


def _described(medium: Any) -> str:
    return f"{len(medium):,} samples" if isinstance(medium, np.ndarray) else f"{medium.width} x {medium.height} pixels"
