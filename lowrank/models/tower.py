"""What a model's own tower (its vision encoder and projector) says of the pictures or videos of documents, in the
family's own form, of any number of them together. Nothing here is of one family: what `get_image_features` is given,
its signature says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lowrank.batches import Batch, Pixels
from lowrank.errors import ModelError
from lowrank.media.processor import MediaProcessor
from lowrank.models.feature_cache import FeatureCache
from lowrank.models.shared_features import SharedFeatures
from lowrank.records import KIND_NAMES, Medium
from lowrank.segments import Media

RESULT = "pooler_output"
_INSIDE = ("last_hidden_state", "hidden_states", "attentions")
"""What towers also say and no language model reads."""

TowerPass = Callable[[int, Batch], AbstractContextManager[None]]
"""Around a pass of the tower over a segment's document: whose adapters are in it, and whether there is a graph."""


class Tower:
    """The tower of a model for one kind of media, with what scatters its features. `takes`: what the backbone's forward
    call may be given."""

    def __init__(
        self,
        kind: str,
        name: str,
        config: Any,
        backbone: Any,
        processor: MediaProcessor,
        forward_parameters: Collection[str],
        shared: SharedFeatures,
    ) -> None:
        """ModelError for a base that takes no features of this kind."""
        self._features = getattr(backbone, _method(kind), None)
        token = token_of(kind, config)
        if self._features is None or token is None or "mm_encoder_outputs" not in forward_parameters:
            names = KIND_NAMES[kind]
            raise ModelError(
                f"{name}: models of type {config.model_type!r} take no features of {names} in this transformers, "
                f"so they are trained without them; leave rows with {names} out"
            )
        self.kind, self.token, self._name, self._processor, self._shared = kind, token, name, processor, shared
        self._text = processor.own.tokenizer.convert_ids_to_tokens(token)
        self.wanted = wanted_by(kind, backbone)
        self.cache: FeatureCache | None = None
        """Where nobody adapts or trains it: what it has said before."""

    def features(self, batch: Batch, tower_pass: TowerPass) -> Any:
        """What transformers' model calls the outputs of this kind, of all documents of the batch together; None where
        no segment has any."""
        found = [each for each in batch.pixels if number_of(self.kind, each.media.inside)]
        return of_all(self.parts(found, batch, tower_pass)) if found else None

    def parts(self, documents: Sequence[Pixels], batch: Batch, tower_pass: TowerPass) -> list[Any]:
        """What the tower says of each document."""
        return [self.of_document(each, batch, tower_pass) for each in documents]

    def of_document(self, pixels: Pixels, batch: Batch, tower_pass: TowerPass) -> Any:
        """What the tower says of what is in the segment, (tokens, D) each, in the family's own form."""
        given = {name: value for name, value in pixels.tensors.items() if name in self.wanted}
        look = partial(self._look, given, pixels.segment, batch, tower_pass)
        if self.cache is not None:
            look = partial(self.cache.features, self.kind, given, look)
        output = self._shared.of(self.kind, batch.slots[pixels.segment], pixels.media, look)
        rows = self.rows(pixels.media)
        kept = {name: rows.of(value) for name, value in output.items()}
        if kept.get(RESULT) is None:
            names = ", ".join(each.name for each in pixels.media.items if each.kind == self.kind)
            raise ModelError(
                f"{self._name}: its tower does not make as many features of {names} as its processor writes "
                f"tokens for them ({rows.whole}): its preprocessor_config.json is of another model"
            )
        return type(output)(**{name: value for name, value in kept.items() if value is not None})

    def _look(self, given: dict[str, Any], segment: int, batch: Batch, tower_pass: TowerPass) -> Any:
        """A pass of the tower: of what it says, what language models read."""
        assert self._features is not None
        with tower_pass(segment, batch):
            output = self._features(**given, return_dict=True)
        return type(output)(**{name: value for name, value in output.items() if name not in _INSIDE})

    def rows(self, media: Media) -> MediaRows:
        """Which of the features of a document are of what is in the segment."""
        own = [each for each in media.items if each.kind == self.kind]
        counts = [text.count(self._text) for text in self._processor.placeholders(own)]
        begin, end = span_of(self.kind, media)
        first = sum(counts[:begin])
        return MediaRows(first, first + sum(counts[begin:end]), sum(counts))


def wanted_by(kind: str, backbone: Any) -> set[str]:
    """What a backbone's tower is given for media of this kind, by name; empty where it has none."""
    features = getattr(backbone, _method(kind), None)
    return set(inspect.signature(features).parameters) if features else set()


def _method(kind: str) -> str:
    return f"get_{kind}_features"


def token_of(kind: str, config: Any) -> int | None:
    """The id that stands for a part of a medium of this kind; None where the configuration names none."""
    found = [getattr(config, f"{kind}_token_{ending}", None) for ending in ("id", "index")]
    return next((int(each) for each in found if each is not None), None)


def number_of(kind: str, items: Sequence[Medium]) -> int:
    """How many of a kind there are."""
    return sum(each.kind == kind for each in items)


def span_of(kind: str, media: Media) -> tuple[int, int]:
    """(first, the one after the last) of the document's media of a kind that are in the segment."""
    before = number_of(kind, media.items[: media.before])
    return before, before + number_of(kind, media.inside)


@dataclass(frozen=True)
class MediaRows:
    """Rows [first, end) of the `whole` that stand for a document's media of a kind."""

    first: int
    end: int
    whole: int

    def of(self, value: Any) -> Any:
        """The rows of a tensor, of one in pieces, or of each of several; None for what has others."""
        if isinstance(value, torch.Tensor):
            flat_KD = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value
            return flat_KD[self.first : self.end] if len(flat_KD) == self.whole else None
        if not isinstance(value, (list, tuple)) or not value:
            return None
        if all(isinstance(each, torch.Tensor) and each.ndim > 1 for each in value):
            flat = [each.reshape(-1, each.shape[-1]) for each in value]
            if sum(map(len, flat)) == self.whole and len({each.shape[1] for each in flat}) == 1:
                return [torch.cat(flat)[self.first : self.end]]
        found = [self.of(each) for each in value]
        return None if any(each is None for each in found) else found


def of_all(parts: Sequence[Any]) -> Any:
    """The outputs of several documents as one, in their form."""
    return type(parts[0])(**{name: joined([part[name] for part in parts]) for name in parts[0]})


def joined(values: Sequence[Any]) -> Any:
    """Of several documents, in one form."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [joined(each) for each in zip(*values)]
