"""The media encoder of a base: makes pixels and waves of documents ready, computes their features by the model's own
towers, and the positions of their tokens for the rotary embedding.

    batch --ready()--> batch with pixels --features()--> what transformers' models take as `mm_encoder_outputs`

The tower runs on each document by itself, as in transformers, and the model scatters its features over the flat stream.
Nothing here is of one family: the signatures of `get_image_features` and `get_rope_index` say what they take.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from lowrank.batches import BASE_SLOT, Batch, Pixels, pack
from lowrank.devices import to_device
from lowrank.errors import ModelError
from lowrank.media.processor import MediaProcessor
from lowrank.models.attention.packed import Blocks
from lowrank.models.audio_encoder import AudioEncoder
from lowrank.models.feature_cache import FeatureCache
from lowrank.models.native_masks import layers_both_ways
from lowrank.models.shared_features import SharedFeatures
from lowrank.models.tower import RESULT, MediaRows, Tower, joined, span_of, wanted_by
from lowrank.records import Medium
from lowrank.segments import Media, Segment

if TYPE_CHECKING:
    from lowrank.models.base import Base

_PLACES = "get_rope_index"
_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What forward methods call (1, L) tensors that are not 0 where a token stands for a part of a medium."""
_NUMBERS = {"image": 1, "video": 2, "audio": 3}
"""What the first of them is there, as transformers' processors number it."""
_SECONDS = "second_per_grid"
"""What names of the seconds that a video's grid of patches is apart have in them."""


class MediaEncoder:
    """The vision and audio front end of one base. `processor`: of the same checkpoint; `kinds` of media to take."""

    tower: type[Tower] = Tower
    audio_encoder: type[AudioEncoder] = AudioEncoder

    def __init__(self, base: Base, processor: MediaProcessor, kinds: Sequence[str] = ("image",)) -> None:
        """ModelError for a base that cannot be shown or played these."""
        self._base, self._backbone, self.processor, self.kinds = base, base.backbone, processor, tuple(kinds)
        self.padded = False
        """Documents with media go through in padded rows while texts go packed: of bases that only answer."""
        self.shared = SharedFeatures()
        """What of a step's features is computed once for several documents."""
        config, forward_parameters = base.model.config, inspect.signature(self._backbone.forward).parameters
        self._towers = {
            kind: self.tower(kind, base.name, config, self._backbone, processor, forward_parameters, self.shared)
            for kind in ("image", "video")
            if kind in kinds
        }
        in_blocks = {kind: layers_both_ways(base.model, _NUMBERS[kind]) for kind in kinds}
        self._in_blocks = [kind for kind, layers in in_blocks.items() if layers]
        self.both_ways: frozenset[str] = frozenset[str]().union(*in_blocks.values())
        """In which kinds of layers the tokens of a picture see one another both ways."""
        places = getattr(self._backbone, _PLACES, None)
        self._of_places = set(inspect.signature(places).parameters) if places else None
        of_prompts = {_TYPES[1]} if base.prompt_type is not None else set[str]()
        self._types = [name for name in _TYPES if name in forward_parameters and name not in of_prompts]
        self._audio_encoder = None
        if "audio" in kinds:
            others = {name for kind in ("image", "video") for name in wanted_by(kind, self._backbone)}
            self._audio_encoder = self.audio_encoder(
                base.name, base.model, self._backbone, processor, others | {*_TYPES}, self.shared
            )

    @property
    def token(self) -> int | None:
        """That stands for a part of a picture, of a base that is shown some."""
        return self._towers["image"].token if "image" in self._towers else None

    @property
    def feature_cache(self) -> FeatureCache | None:
        """What the towers have said before, where that is kept."""
        return next((tower.cache for tower in self._towers.values()), None)

    @feature_cache.setter
    def feature_cache(self, cache: FeatureCache | None) -> None:
        for tower in self._towers.values():
            tower.cache = cache

    @contextlib.contextmanager
    def uncached(self) -> Generator[None]:
        """Passes over made-up media, which are to happen, and of which nothing is worth keeping."""
        before, self.feature_cache = self.feature_cache, None
        try:
            yield
        finally:
            self.feature_cache = before

    def pixels(self, items: tuple[Medium, ...]) -> dict[str, torch.Tensor]:
        """What the towers are given for a document of these media, on the host. Any thread may ask."""
        return self.read(self.processor.inputs(items))

    def read(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of what the processor makes, what the model reads."""
        wanted = set().union(*(tower.wanted for tower in self._towers.values()), self._of_places or ())
        wanted |= {name for name in inputs if _SECONDS in name}
        wanted |= self._audio_encoder.wanted if self._audio_encoder else set()
        return {name: value for name, value in inputs.items() if name in wanted}

    def ready(
        self, batch: Batch, known: Mapping[tuple[Medium, ...], Mapping[str, torch.Tensor]] | None = None
    ) -> Batch:
        """The batch with the pixels of its documents, and their places where a model counts these in three dimensions.
        Segments with the same media share them. `known`: what `pixels` gave for these media."""
        known, cast = known or {}, dict[tuple[Medium, ...], dict[str, torch.Tensor]]()
        for _, media in batch.media:
            if media.items not in cast:
                found = known.get(media.items)
                cast[media.items] = self.cast(self.pixels(media.items) if found is None else found)
        made = tuple(Pixels(index, media, cast[media.items]) for index, media in batch.media)
        return replace(batch, pixels=made, mrope_position_3T=self._places(batch, made))

    def options(self, batch: Batch, token: torch.Tensor) -> dict[str, Any]:
        """What the model's forward call is given beside `token`, the tokens in the shape it is given them."""
        if not batch.pixels:
            return {}
        padded, options = self._base.layout_of(batch) == "padded", dict[str, Any]()
        found = {kind: tower.features(batch, self._tower_pass) for kind, tower in self._towers.items()}
        outputs = {kind: output for kind, output in found.items() if output is not None}
        if outputs:
            options["mm_encoder_outputs"] = outputs
        if self._audio_encoder is not None:
            options |= self._audio_encoder.options(batch, token.shape[1] if padded else None, self._tower_pass)
        if padded:  # where the model makes its own masks
            options |= {name: self.types(token, name) for name in self._types}
        return options

    def blocks(self, token_T: torch.Tensor) -> Blocks | None:
        """The pictures of a stream whose tokens see one another both ways: neighbors, as transformers finds them."""
        if not self.both_ways:
            return None
        type_T = self.types(token_T)
        inside_T = torch.stack([type_T == _NUMBERS[kind] for kind in self._in_blocks]).any(0)
        begins_T = inside_T & ~F.pad(inside_T, (1, 0))[:-1]
        return Blocks(begins_T.cumsum(0) * inside_T, self.both_ways)

    @property
    def in_fixed_batches(self) -> bool:
        """Whether questions with media are answered by transformers' `generate`: where such documents are padded rows,
        and where a picture has to be read in one piece."""
        return self.padded or bool(self.both_ways)

    def types(self, token: torch.Tensor, name: str = _TYPES[0]) -> torch.Tensor:
        """What a token stands for a part of, as a number; 0: of nothing."""
        found = torch.zeros_like(token)
        ids = {kind: tower.token for kind, tower in self._towers.items()}
        if self._audio_encoder is not None:
            ids["audio"] = self._audio_encoder.token
        for kind, own in ids.items():
            if name == _TYPES[0] or kind == "image":
                found = found + _NUMBERS[kind] * (token == own)
        return found

    def cast(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What towers are given, in what the base computes in."""
        dtype = self._base.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() and _SECONDS not in name else value
            for name, value in tensors.items()
        }

    def encode(self, token_L: np.ndarray, media: Media, slot: int = BASE_SLOT) -> EncodedMedia:
        """Let the tower, as `slot` has it, look at the pictures of one document, once for all of its answer."""
        segment = Segment(token_L, np.zeros(len(token_L), np.float32), media=media)
        batch = self.ready(pack([(slot, segment)])).to(self._base.device)
        before = np.concatenate([[0], np.cumsum(token_L == self.token)])
        output = self._towers["image"].features(batch, self._tower_pass)
        return EncodedMedia(output, tuple(before.tolist()), batch.mrope_position_3T, _grids(batch.pixels[0]))

    def in_chunks(
        self, chunks: Sequence[EncodedChunk], token_T: torch.Tensor, position_T: torch.Tensor
    ) -> dict[str, Any]:
        """What the forward call of a step of generation is given. Where nobody has pictures, or an answer writes their
        token itself, that token is an ordinary one: its features are its own embedding."""
        some = next(each.encoded for each in chunks if each.encoded is not None)
        ids = token_T.tolist()
        found: list[dict[str, Any]] = []
        mrope_position_3T = position_T[None].expand(3, -1).clone()
        at = 0
        for chunk in chunks:
            seen, end = chunk.encoded, chunk.first + chunk.length
            own = 0
            if seen is not None:
                known = min(end, seen.length)
                if chunk.first < known:
                    rows = MediaRows(seen.before[chunk.first], seen.before[known], seen.before[-1])
                    own = rows.end - rows.first
                    found += [{name: rows.of(value) for name, value in seen.output.items()}] if own else []
                if seen.mrope_position_3L is not None:
                    ahead = int(seen.mrope_position_3L.max()) + 1 - seen.length
                    mrope_position_3T[:, at : at + chunk.length] += ahead
                    mrope_position_3T[:, at : at + max(0, known - chunk.first)] = seen.mrope_position_3L[
                        :, chunk.first : known
                    ]
            extra_placeholders = ids[at : at + chunk.length].count(self.token) - own
            found += [
                {
                    name: self._placeholder_features(name, value, extra_placeholders)
                    for name, value in some.output.items()
                }
            ] * (extra_placeholders > 0)
            at += chunk.length
        position = mrope_position_3T[:, None] if self._of_places is not None else position_T[None]
        if all(chunk.encoded is None or chunk.first >= chunk.encoded.length for chunk in chunks) or not found:
            return {"position_ids": position}
        image = type(some.output)(**_joined_by_name(found))
        return {"position_ids": position, "mm_encoder_outputs": {"image": image}}

    def in_rows(self, rows: Sequence[EncodedMedia | None], token_BL: torch.Tensor) -> dict[str, Any]:
        """What transformers' `generate` is given of documents that are padded rows, read whole; None: one without
        pictures, whose tokens are ordinary ones."""
        some = next((seen for seen in rows if seen is not None), None)
        if some is None:
            return {}
        found: list[Mapping[str, Any]] = []
        for seen, token_L in zip(rows, token_BL):
            extra_placeholders = int((token_L == self.token).sum()) if seen is None else 0
            if seen is not None:
                found.append(seen.output)
            elif extra_placeholders:
                found.append(
                    {
                        name: self._placeholder_features(name, value, extra_placeholders)
                        for name, value in some.output.items()
                    }
                )
        shown_B1 = torch.tensor([[seen is not None] for seen in rows], device=token_BL.device)
        grids = [seen.grids for seen in rows if seen is not None]
        return {
            "mm_encoder_outputs": {"image": type(some.output)(**_joined_by_name(found))},
            **{name: self.types(token_BL, name) * shown_B1 for name in self._types},
            **(_joined_by_name(grids) if self._of_places is not None else {}),
        }

    def _placeholder_features(self, name: str, value: Any, rows: int) -> Any:
        """The features of the picture's token where it is only a token."""
        if isinstance(value, torch.Tensor):
            if name != RESULT:
                return value.new_zeros(rows, value.shape[-1])
            embedding: Any = self._base.model.get_input_embeddings()
            while getattr(embedding, "is_routed", False):
                embedding = embedding.base
            assert self.token is not None, "it is asked about pictures alone"
            return embedding(torch.full((rows,), self.token, device=value.device)).to(value.dtype)
        return [self._placeholder_features(name, each, rows) for each in value]

    def _tower_pass(self, segment: int, batch: Batch) -> contextlib.AbstractContextManager[None]:
        """Around a pass of the tower: whose adapters are in it, and whether there is a graph."""
        if self._base.tower_pass is None:
            return torch.no_grad()
        return self._base.tower_pass(batch.slots[segment], batch.origin_S[segment : segment + 1])

    def _places(self, batch: Batch, pixels: Sequence[Pixels]) -> torch.Tensor | None:
        """(3, T) of models that count time, height and width; None of others."""
        if self._of_places is None or not pixels:
            return None
        mrope_position_3T = batch.position_T[None].expand(3, -1).clone()
        starts = batch.starts
        for each in pixels:
            first, end = starts[each.segment], starts[each.segment + 1]
            token_1L = batch.token_T[first:end][None]
            grids = _grids(each)
            known = {
                "input_ids": token_1L,
                "attention_mask": torch.ones_like(token_1L),
                "mm_token_type_ids": self.types(token_1L).int(),
                "audio_seqlens": _lengths_of_sounds(each),
                "second_per_grids": next((value for name, value in grids.items() if _SECONDS in name), None),
                **grids,
            }
            given = {name: value for name, value in known.items() if name in self._of_places}
            found_31L, _ = getattr(self._backbone, _PLACES)(**given)
            mrope_position_3T[:, first:end] = found_31L[-3:, 0]
        return mrope_position_3T


def _grids(pixels: Pixels) -> dict[str, torch.Tensor]:
    """Sizes in patches of the pictures and videos that are in the segment, and seconds between those of videos."""
    found = {}
    for name, value in pixels.tensors.items():
        if name.endswith("grid_thw") or _SECONDS in name:
            begin, end = span_of("image" if name.startswith("image") else "video", pixels.media)
            found |= {name: value[begin:end]} if end > begin else {}
    return found


def _joined_by_name(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: joined([each[name] for each in documents]) for name in documents[0]}


def _lengths_of_sounds(pixels: Pixels) -> torch.Tensor | None:
    """(sounds in the segment) frames of each, for models that count places by them; None where there are none."""
    masks = [value for name, value in pixels.tensors.items() if "mask" in name and value.ndim == 2]
    begin, end = span_of("audio", pixels.media)
    return masks[0][begin:end].sum(-1) if masks and end > begin else None


@dataclass(frozen=True)
class EncodedMedia:
    """A document whose pictures the tower has looked at.

    output     what it says of them, in the family's form
    before     of the document's tokens and its end: how many that stand for pictures come before
    mrope_position_3L   places in three dimensions, where the model counts so
    grids      sizes in patches of the pictures, by the processor's names
    """

    output: Any
    before: tuple[int, ...]
    mrope_position_3L: torch.Tensor | None
    grids: Mapping[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Tokens of the document."""
        return len(self.before) - 1


@dataclass(frozen=True)
class EncodedChunk:
    """Tokens [first, first + length) of a sequence in one step of generation; None: it has no pictures."""

    first: int
    length: int
    encoded: EncodedMedia | None


def show_media(base: Base, batch: Batch) -> Batch:
    """The batch with its pixels, on its own device. ModelError where the base has no media encoder."""
    if base.media_encoder is None:
        raise ModelError(f"{base.name}: these rows have more than text, and the base was loaded to read text alone")
    device = batch.token_T.device
    host = base.media_encoder.ready(batch.moved(torch.Tensor.cpu))
    return host.moved(lambda tensor: to_device(tensor, device))
