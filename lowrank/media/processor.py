"""Makes pictures, videos and sounds ready for a model: the placeholder tokens of each in its text, and the tensors of
its towers.

Both come from the model's own processor, whose unit is the document: some families cut a picture in tiles only where it
is alone. The counts need no decoding: what stands for media depends on their sizes, so blank ones of the same sizes
are asked about, and each document's sizes once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.hub import cached_file

from lowrank.errors import ModelError, first_line
from lowrank.foreign_files import read_json
from lowrank.media.audio import check_rate, decoded_audio, resampled_length
from lowrank.media.decoding import blank, decoded
from lowrank.media.limits import MediaLimits
from lowrank.media.medium_files import BadMedium
from lowrank.media.torchvision import torchvision_problem
from lowrank.media.video import decoded_video
from lowrank.records import KIND_NAMES, Audio, Medium, Picture, Video

_ATTRIBUTE = "media_processor"
_PLAIN = {"do_rescale": False, "do_normalize": False, "resample": 0}
"""What of an image processor's work does not change how many tokens there are."""
_SIZES_KEPT = 100_000
_TOWERS = {"image": "vision_config", "video": "vision_config", "audio": "audio_config"}
"""Where a model's configuration describes what perceives a kind of medium."""
_TOKENS = {"video": ("video_token_id", "video_token_index")}
"""And what it names where not every such model takes this kind."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""One of them says how media are made ready."""
_CALLED = {"image": "images", "video": "videos", "audio": "audio"}
"""What processors call the media of a kind."""
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels")

Size = tuple[float, ...]
"""What decides what stands for a medium: (width, height) of a picture, (samples,) of a sound; of a video those of its
frames, how many of them there are and in a second, and which are shown."""


class MediaProcessor:
    """The processor of the checkpoint at `path`; nothing is loaded before the first picture or sound."""

    def __init__(
        self,
        path: str,
        revision: str | None,
        tokenizer: Any,
        limits: MediaLimits | None = None,
    ) -> None:
        self._path, self._revision, self._tokenizer = path, revision, tokenizer
        self.limits = limits or MediaLimits()
        self._known: dict[tuple[tuple[str, Size], ...], tuple[str, ...]] = {}
        self._served: dict[tuple[int, int], bool] = {}

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of media that the model has towers for, with files that say how to make them ready."""
        if not any(self._file(name) for name in PROCESSOR_FILES):
            return ()
        found = [kind for kind, part in _TOWERS.items() if self._config.get(part) is not None]
        named = {kind for kind, names in _TOKENS.items() if any(self._config.get(name) is not None for name in names)}
        return tuple(kind for kind in found if kind not in _TOKENS or kind in named)

    def leave_out(self, kind: str) -> None:
        """From now on the model is not given media of this kind, as if it had no tower for them."""
        self.kinds = tuple(each for each in self.kinds if each != kind)

    @property
    def supports_images(self) -> bool:
        """Whether the model can be shown pictures."""
        return "image" in self.kinds

    @cached_property
    def own(self) -> Any:
        """transformers' processor, but for videos. ModelError where it cannot be made."""
        return self._load([kind for kind in self.kinds if kind != "video"])

    @cached_property
    def of_videos(self) -> Any:
        """transformers' processor with all of its parts. ModelError where it cannot be made, or without torchvision."""
        problem = torchvision_problem()
        if problem is not None:
            raise ModelError(
                f"{self._path}: transformers makes videos ready by torchvision, and {problem}: pip install "
                "'lowrank-llm[video]', or leave rows with videos out"
            )
        return self._load(self.kinds)

    def _load(self, kinds: Sequence[str]) -> Any:
        from lowrank.media.loading import load_processor  # seconds of imports, for rows with media alone

        return load_processor(self._path, self._revision, self._tokenizer, kinds, self._config.get("model_type"))

    def placeholder(self, kind: str) -> str:
        """What the model's chat template writes for a medium of this kind. ModelError where it has nothing for it."""
        found = getattr(self.of_videos if kind == "video" else self.own, f"{kind}_token", None)
        if found is None:
            raise ModelError(f"the model's processor has no token that stands for {KIND_NAMES[kind]}")
        return found

    @property
    def rate(self) -> int:
        """Samples in a second of the sounds that the model hears."""
        return int(self.own.feature_extractor.sampling_rate)

    def placeholders(self, media: Sequence[Medium]) -> tuple[str, ...]:
        """What stands for each medium of a document. ModelError in the processor's words for sizes that it refuses."""
        sizes = self.sizes(media)
        if sizes not in self._known:
            if len(self._known) >= _SIZES_KEPT:
                self._known.clear()
            (found,) = self._blanks_processed(sizes)["text_replacement_offsets"]
            self._known[sizes] = tuple(each["replacement"] for each in found)
        return self._known[sizes]

    def takes_whole(self, audio: Audio) -> bool:
        """Whether what stands for a sound would be less, were its last second not there: processors cut off what is
        longer than they were made for."""
        shorter = Audio("", max(1, audio.frames - audio.rate), audio.rate)
        return audio.seconds < 2 or self.placeholders([shorter]) != self.placeholders([audio])

    def counts_as_served(self, picture: Picture) -> bool:
        """Whether as many tokens stand for a picture as where the model's own processor is shown it as it is, without
        the limits of pixels here. True too where a processor does not tell the numbers that servers ask it for."""
        given, limited = (picture.width, picture.height), self.limits.of_picture(picture.width, picture.height)
        counts_of = getattr(self.own, "_get_num_multimodal_tokens", None)
        if given == limited or counts_of is None:
            return True
        if given not in self._served:
            try:
                here, there = counts_of(image_sizes=[limited[::-1], given[::-1]]).num_image_tokens
            except Exception:  # of a size that it was not made for
                here = there = 0
            self._served[given] = here == there
        return self._served[given]

    def inputs(self, media: Sequence[Medium]) -> dict[str, torch.Tensor]:
        """The tensors of a document's media that its model reads: `pixel_values`, `input_features` and what its family
        has beside.

        BadMedium for one that cannot be decoded (any more), with its row.
        """
        return _of_media(self._processed(self.sizes(media), list(map(self._ready, media))))

    def blank_inputs(self, media: Sequence[Medium]) -> dict[str, torch.Tensor]:
        """Tensors as `inputs` gives them, but for what is in them, and for the dtype of pixels."""
        return _of_media(self._blanks_processed(self.sizes(media)))

    def sizes(self, media: Sequence[Medium]) -> tuple[tuple[str, Size], ...]:
        """What decides how large the tensors of a document's media are."""
        return tuple((each.kind, self._size(each)) for each in media)

    def shown_frames(self, video: Video) -> tuple[int, ...]:
        """Which frames of a video the model is shown."""
        return self.limits.frames(video.frames, video.fps)

    def _size(self, medium: Medium) -> Size:
        if isinstance(medium, Picture):
            return self.limits.of_picture(medium.width, medium.height)
        if isinstance(medium, Video):
            fps = medium.fps or self.limits.video_fps
            size = self.limits.of_frame(medium.width, medium.height)
            return (*size, medium.frames, fps, *self.shown_frames(medium))
        check_rate(medium, self.rate)
        return (resampled_length(medium, self.rate),)

    def _ready(self, medium: Medium) -> Any:
        try:
            return self._decoded(medium)
        except BadMedium as error:
            raise error.of(medium) from error

    def _decoded(self, medium: Medium) -> Any:
        if isinstance(medium, Picture):
            return decoded(medium, self.limits.of_picture(medium.width, medium.height))
        if isinstance(medium, Video):
            size = self.limits.of_frame(medium.width, medium.height)
            return decoded_video(medium, self.shown_frames(medium), size)
        return decoded_audio(medium, self.rate)

    def _blanks_processed(self, sizes: Sequence[tuple[str, Size]]) -> Any:
        return self._processed(sizes, list(map(_blank, sizes)), blank=True)

    def _processed(self, sizes: Sequence[tuple[str, Size]], media: Sequence[Any], blank: bool = False) -> Any:
        """What the processor makes of one document that is its media alone."""
        kinds = [kind for kind, _ in sizes]
        given: dict[str, Any] = {}
        for kind in dict.fromkeys(kinds):
            own = [medium for each, medium in zip(kinds, media) if each == kind]
            given[_CALLED[kind]] = [own] if kind == "image" else own
        if "audio" in kinds:
            given["audio_kwargs"] = {"sampling_rate": self.rate}
        if "image" in kinds and blank:
            given["images_kwargs"] = _PLAIN
        if "video" in kinds:
            given["videos_kwargs"] = {
                "do_sample_frames": False,  # it is given those that are shown
                "video_metadata": [_metadata(size) for kind, size in sizes if kind == "video"],
                **(_PLAIN if blank else {}),
            }
        try:
            return (self.of_videos if "video" in kinds else self.own)(
                text=["".join(map(self.placeholder, kinds))],
                return_text_replacement_offsets=True,
                return_tensors="pt",
                **given,
            )
        except Exception as error:  # whatever transformers makes of a size it was not made for
            raise ModelError(f"{', '.join(map(_described, media))}: {first_line(error)}") from error

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


def _of_media(processed: Any) -> dict[str, torch.Tensor]:
    return {
        name: _alone(value)
        for name, value in processed.items()
        if isinstance(value, torch.Tensor) and name not in _OF_TEXT
    }


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Without what it is a view of: masks of sounds are every 160th of all samples' mask, and would keep that."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _blank(sized: tuple[str, Size]) -> Any:
    """A medium of a kind and size that holds nothing."""
    kind, size = sized
    if kind == "audio":
        return np.zeros(int(size[0]), np.float32)
    width, height = int(size[0]), int(size[1])
    return blank((width, height)) if kind == "image" else np.zeros((len(size) - 4, height, width, 3), np.uint8)


def _metadata(size: Size) -> dict[str, Any]:
    """What transformers knows of a video of this size."""
    width, height, frames, fps, *shown = size
    return {
        "total_num_frames": int(frames),
        "fps": float(fps),
        "width": int(width),
        "height": int(height),
        "duration": frames / fps,
        "frames_indices": [int(place) for place in shown],
    }


def _described(medium: Any) -> str:
    if not isinstance(medium, np.ndarray):
        return f"{medium.width} x {medium.height} pixels"
    if medium.ndim == 1:
        return f"{len(medium):,} samples"
    return f"{len(medium)} frames of {medium.shape[2]} x {medium.shape[1]} pixels"
