"""How a base is shown pictures and played sounds: pixels of documents, features by the model's own tower, places for
rotation.

    batch --ready()--> batch with pixels --features()--> what transformers' models take as `mm_encoder_outputs`

The tower sees each document by itself, as in transformers, and what it says is scattered by the model over the one flat
stream. Nothing here is of one family: what `get_image_features` and `get_rope_index` are given, their signatures say.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank.batches import BARE_BASE, Batch, Media, Pixels, Segment, pack, to_device
from lowrank.errors import ModelError
from lowrank.media.processor import MediaProcessor
from lowrank.models.hearing import Hearing
from lowrank.records import Audio, Medium, Picture

if TYPE_CHECKING:
    from lowrank.models.base import Base

_FEATURES, _PLACES = "get_image_features", "get_rope_index"
_RESULT = "pooler_output"
_INSIDE = ("last_hidden_state", "hidden_states", "attentions")
"""What towers also say and no language model reads."""
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What forward methods call (1, L) tensors that are 1 where a token stands for a part of a picture."""
_SOUND_TYPE = 3
"""What the first of them is where a token stands for a part of a sound."""


class Sight:
    """The eyes and ears of one base. `processor`: of the same checkpoint; `kinds`: of media that it is to take."""

    def __init__(self, base: Base, processor: MediaProcessor, kinds: Sequence[str] = ("image",)) -> None:
        """ModelError for a base that cannot be shown or played these."""
        self._base, self._backbone, self.processor, self.kinds = base, base.backbone, processor, tuple(kinds)
        takes = inspect.signature(self._backbone.forward).parameters
        features = getattr(self._backbone, _FEATURES, None)
        self._wanted = set(inspect.signature(features).parameters) if features else set[str]()
        self.token = self._token_of_pictures(base, takes) if "image" in kinds else None
        self._text = None if self.token is None else processor.own.tokenizer.convert_ids_to_tokens(self.token)
        places = getattr(self._backbone, _PLACES, None)
        self._of_places = set(inspect.signature(places).parameters) if places else None
        self._types = [name for name in _TYPES if name in takes]
        self._hearing = None
        if "audio" in kinds:
            self._hearing = Hearing(base.name, base.model, self._backbone, processor, self._wanted | {*_TYPES})

    def _token_of_pictures(self, base: Base, takes: Collection[str]) -> int:
        config = base.model.config
        token = getattr(config, "image_token_id", None)
        token = getattr(config, "image_token_index", None) if token is None else token
        if not self._wanted or token is None or "mm_encoder_outputs" not in takes:
            raise ModelError(
                f"{base.name}: models of type {config.model_type!r} take no features of pictures in this transformers, "
                "so they are trained on text alone; leave rows with pictures out"
            )
        return int(token)

    def pixels(self, media: Media) -> dict[str, torch.Tensor]:
        """What the tower is given for a document, on the host. Any thread may ask."""
        found = self.processor.inputs(media.items)
        wanted = self._wanted | (self._of_places or set()) | (self._hearing.wanted if self._hearing else set())
        return {name: value for name, value in found.items() if name in wanted}

    def ready(self, batch: Batch, known: Mapping[int, Mapping[str, torch.Tensor]] | None = None) -> Batch:
        """The batch with the pixels of its documents, and their places where a model counts these in three dimensions.
        `known`: what `pixels` gave for a segment, by its index."""
        known = known or {}
        made = tuple(
            Pixels(index, media, self._cast(known[index] if index in known else self.pixels(media)))
            for index, media in batch.media
        )
        return replace(batch, pixels=made, place_3T=self._places(batch, made))

    def options(self, batch: Batch, token: torch.Tensor) -> dict[str, Any]:
        """What the model's forward call is given beside `token`, the tokens in the shape it is given them."""
        if not batch.pixels:
            return {}
        padded, options = self._base.layout == "padded", dict[str, Any]()
        if self.token is not None and any(_has_pictures(each.media) for each in batch.pixels):
            options["mm_encoder_outputs"] = {"image": self.features(batch)}
        if self._hearing is not None:
            options |= self._hearing.options(batch, token.shape[1] if padded else None, self._tower_pass)
        if padded:  # where the model makes its own masks
            options |= {name: self.types(token, name) for name in self._types}
        return options

    def types(self, token: torch.Tensor, name: str = _TYPES[0]) -> torch.Tensor:
        """What a token stands for a part of, as transformers' processors number it: 1 a picture, 3 a sound, 0 none."""
        found = torch.zeros_like(token) if self.token is None else (token == self.token).long()
        if self._hearing is not None and name == _TYPES[0]:
            found = found + _SOUND_TYPE * (token == self._hearing.token)
        return found

    def features(self, batch: Batch) -> Any:
        """What transformers' model calls the image's outputs, of all documents of the batch together."""
        parts = [self._of_document(each, batch) for each in batch.pixels if _has_pictures(each.media)]
        return type(parts[0])(**{name: _joined([part[name] for part in parts]) for name in parts[0]})

    def look(self, token_L: np.ndarray, media: Media, slot: int = BARE_BASE) -> Seen:
        """Let the tower, as `slot` has it, look at the pictures of one document, once for all of its answer."""
        segment = Segment(token_L, np.zeros(len(token_L), np.float32), media=media)
        batch = self.ready(pack([(slot, segment)])).to(self._base.device)
        before = np.concatenate([[0], np.cumsum(token_L == self.token)])
        return Seen(self.features(batch), tuple(before.tolist()), batch.place_3T)

    def in_pieces(self, pieces: Sequence[PieceSeen], token_T: torch.Tensor, position_T: torch.Tensor) -> dict[str, Any]:
        """What the forward call of a step of generation is given. Where nobody has pictures, or an answer writes their
        token itself, that token is an ordinary one: its features are its own embedding."""
        some = next(each.seen for each in pieces if each.seen is not None)
        ids = token_T.tolist()
        found: list[dict[str, Any]] = []
        place_3T = position_T[None].expand(3, -1).clone()
        at = 0
        for piece in pieces:
            seen, end = piece.seen, piece.first + piece.length
            own = 0
            if seen is not None:
                known = min(end, seen.length)
                if piece.first < known:
                    rows = _Rows(seen.before[piece.first], seen.before[known], seen.before[-1])
                    own = rows.end - rows.first
                    found += [{name: rows.of(value) for name, value in seen.output.items()}] if own else []
                if seen.place_3L is not None:
                    ahead = int(seen.place_3L.max()) + 1 - seen.length
                    place_3T[:, at : at + piece.length] += ahead
                    place_3T[:, at : at + max(0, known - piece.first)] = seen.place_3L[:, piece.first : known]
            strangers = ids[at : at + piece.length].count(self.token) - own
            found += [{name: self._stranger(name, value, strangers) for name, value in some.output.items()}] * (
                strangers > 0
            )
            at += piece.length
        position = place_3T[:, None] if self._of_places is not None else position_T[None]
        if all(piece.seen is None or piece.first >= piece.seen.length for piece in pieces) or not found:
            return {"position_ids": position}
        image = type(some.output)(**{name: _joined([each[name] for each in found]) for name in some.output})
        return {"position_ids": position, "mm_encoder_outputs": {"image": image}}

    def _stranger(self, name: str, value: Any, rows: int) -> Any:
        """The features of the picture's token where it is only a token."""
        if isinstance(value, torch.Tensor):
            if name != _RESULT:
                return value.new_zeros(rows, value.shape[-1])
            embedding: Any = self._base.model.get_input_embeddings()
            while getattr(embedding, "is_routed", False):
                embedding = embedding.base
            assert self.token is not None, "it is asked about pictures alone"
            return embedding(torch.full((rows,), self.token, device=value.device)).to(value.dtype)
        return [self._stranger(name, each, rows) for each in value]

    def _of_document(self, pixels: Pixels, batch: Batch) -> Any:
        """What the tower says of the pictures that are in the segment, (tokens, D) each, in the family's own form."""
        given = {name: value for name, value in pixels.tensors.items() if name in self._wanted}
        with self._tower_pass(pixels.segment, batch):
            output = getattr(self._backbone, _FEATURES)(**given, return_dict=True)
        media = pixels.media
        pictures = [each for each in media.items if isinstance(each, Picture)]
        counts = [text.count(self._text or "") for text in self.processor.placeholders(pictures)]
        before = _pictures_in(media.items[: media.before])
        first = sum(counts[:before])
        rows = _Rows(first, first + sum(counts[before : before + _pictures_in(media.inside)]), sum(counts))
        kept = {name: rows.of(value) for name, value in output.items() if name not in _INSIDE}
        if kept.get(_RESULT) is None:
            names = ", ".join(each.name for each in pictures)
            raise ModelError(
                f"{self._base.name}: its tower does not make as many features of {names} as its processor writes "
                f"tokens for them ({rows.whole}): its preprocessor_config.json is of another model"
            )
        return type(output)(**{name: value for name, value in kept.items() if value is not None})

    def _cast(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = self._base.dtype
        return {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}

    def _tower_pass(self, segment: int, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Around a pass of the tower: whose adapters are in it, and whether there is a graph."""
        if self._base.tower_pass is None:
            return torch.no_grad()
        return self._base.tower_pass(batch.slots[segment], batch.origin_S[segment : segment + 1])

    def _places(self, batch: Batch, pixels: Sequence[Pixels]) -> torch.Tensor | None:
        """(3, T) of models that count time, height and width; None of others."""
        if self._of_places is None or not pixels:
            return None
        place_3T = batch.position_T[None].expand(3, -1).clone()
        starts = batch.starts
        for each in pixels:
            first, end = starts[each.segment], starts[each.segment + 1]
            token_1L = batch.token_T[first:end][None]
            begin, inside = _pictures_in(each.media.items[: each.media.before]), _pictures_in(each.media.inside)
            grids = {
                name: value[begin : begin + inside]
                for name, value in each.tensors.items()
                if name.endswith("grid_thw") and inside
            }
            known = {
                "input_ids": token_1L,
                "attention_mask": torch.ones_like(token_1L),
                "mm_token_type_ids": self.types(token_1L).int(),
                "audio_seqlens": _lengths_of_sounds(each),
                **grids,
            }
            given = {name: value for name, value in known.items() if name in self._of_places}
            found_31L, _ = getattr(self._backbone, _PLACES)(**given)
            place_3T[:, first:end] = found_31L[-3:, 0]
        return place_3T


def _has_pictures(media: Media) -> bool:
    return _pictures_in(media.inside) > 0


def _pictures_in(items: Sequence[Medium]) -> int:
    return sum(isinstance(each, Picture) for each in items)


def _lengths_of_sounds(pixels: Pixels) -> torch.Tensor | None:
    """(sounds in the segment) frames of each, for models that count places by them; None where there are none."""
    media = pixels.media
    masks = [value for name, value in pixels.tensors.items() if "mask" in name and value.ndim == 2]
    begin, inside = (
        sum(isinstance(each, Audio) for each in part) for part in (media.items[: media.before], media.inside)
    )
    return masks[0][begin : begin + inside].sum(-1) if masks and inside else None


@dataclass(frozen=True)
class Seen:
    """A document whose pictures the tower has looked at.

    output     what it says of them, in the family's form
    before     of the document's tokens and its end: how many that stand for pictures come before
    place_3L   places in three dimensions, where the model counts so
    """

    output: Any
    before: tuple[int, ...]
    place_3L: torch.Tensor | None

    @property
    def length(self) -> int:
        """Tokens of the document."""
        return len(self.before) - 1


@dataclass(frozen=True)
class PieceSeen:
    """Tokens [first, first + length) of a sequence in one step of generation; None: it has no pictures."""

    first: int
    length: int
    seen: Seen | None


@dataclass(frozen=True)
class _Rows:
    """Rows [first, end) of the `whole` that stand for a document's pictures."""

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


def _joined(values: Sequence[Any]) -> Any:
    """Of several documents, in one form."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(list(values))
    return [_joined(each) for each in zip(*values)]


def show_media(base: Base, batch: Batch) -> Batch:
    """The batch with its pixels, on its own device. ModelError where nobody has given the base eyes."""
    if base.sight is None:
        raise ModelError(f"{base.name}: these rows have pictures or sounds, and the base was loaded to read text alone")
    device = batch.token_T.device
    host = base.sight.ready(batch.moved(torch.Tensor.cpu))
    return host.moved(lambda tensor: to_device(tensor, device))
