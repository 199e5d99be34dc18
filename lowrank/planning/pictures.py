"""Pictures and sounds in a planned step: the tower is given blank ones of the same sizes, on fake tensors.

The tower's part of a pass is watched apart from the language model's. It is the same however many decoder layers there
are, so it must not be hidden in peaks of which the rest grows with the layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]
from torch.utils._pytree import tree_leaves, tree_map_only

from lowrank.batches import Batch, Pixels
from lowrank.media.processor import MediaProcessor, Size
from lowrank.models.audio_encoder import AudioEncoder
from lowrank.models.base import Base
from lowrank.models.media_encoder import MediaEncoder
from lowrank.models.tower import Tower, TowerPass
from lowrank.planning.live_bytes import LiveBytes
from lowrank.segments import Media

_PIXELS, _SPECTRUM = "pixel_values", "input_features"
_VALUES = 1024
"""Floats up to so many say something about a document (seconds between frames); more are what it shows."""
_FLOAT_BYTES = 4
"""Processors make float32."""

Sizes = tuple[tuple[str, Size], ...]


@dataclass
class MediaTraceCache:
    """What was found out about documents, by the sizes of their media.

    blank    what the towers are given, but for what they show
    frozen   what a tower that nobody adapts gives (without memory), and the peak while it looks, by kind
    """

    blank: dict[Sizes, dict[str, torch.Tensor]] = field(default_factory=dict)
    frozen: dict[tuple[str, Sizes], tuple[Any, int]] = field(default_factory=dict)


class PlannedTower(Tower):
    """A tower on fake tensors. Of a slot's documents the largest is computed; of the others there is as much of
    everything as they have pixels, since towers of many small steps take a second for each."""

    live: LiveBytes
    known: MediaTraceCache
    near: torch.Tensor
    """A fake tensor, whose `new_empty` are fake whatever their size."""
    adapted: Collection[int] = ()
    """Slots that have something on the tower or the projector."""
    others = 0
    """Bytes that documents which are not computed hold for the backward pass."""

    def parts(self, documents: Sequence[Pixels], batch: Batch, tower_pass: TowerPass) -> list[Any]:
        """As of any tower."""
        found: dict[int, Any] = {}
        for slot in sorted({batch.slots[each.segment] for each in documents}):
            own = [each for each in documents if batch.slots[each.segment] == slot]
            look = self._adapted if slot in self.adapted else self._frozen
            found |= look(max(own, key=_pixels_in), own, batch, tower_pass)
        return [found[each.segment] for each in documents]

    def _frozen(self, largest: Pixels, own: Sequence[Pixels], batch: Batch, tower_pass: TowerPass) -> dict[int, Any]:
        key = self.kind, self._processor.sizes(largest.media.items)
        if key not in self.known.frozen:
            before = self.live.now
            with self.live.apart() as phase:
                like = self.of_document(largest, batch, tower_pass)
            with _disable_current_modes():  # what is remembered is no memory of the step
                nowhere = torch.empty(0, device="meta")
                self.known.frozen[key] = _empty_like(like, self._number(largest), nowhere), phase.bytes - before
            del like
        shapes, peak = self.known.frozen[key]
        made = {each.segment: _empty_like(shapes, self._number(each), self.near) for each in own}
        self.live.peak = max(self.live.peak, self.live.now + peak)
        return made

    def _adapted(self, largest: Pixels, own: Sequence[Pixels], batch: Batch, tower_pass: TowerPass) -> dict[int, Any]:
        before = self.live.now
        with self.live.apart() as phase:
            like = self.of_document(largest, batch, tower_pass)
        kept = self.live.now - before
        self.live.peak = max(self.live.peak, phase.bytes)
        made = {largest.segment: like}
        for each in own:
            if each is not largest:
                share = kept * _pixels_in(each) // _pixels_in(largest)
                made[each.segment] = _empty_like(like, self._number(each), self.near, share)
        self.others = max(self.others, self.live.now - before - kept)  # in truth the largest may be the last
        return made

    def _number(self, document: Pixels) -> int:
        rows = self.rows(document.media)
        return rows.end - rows.first

    def bytes_of_token(self) -> int:
        """Of what a tower that nobody adapts says of a token, as far as it has been asked."""
        for (kind, _), (shapes, _) in self.known.frozen.items():
            if kind == self.kind:
                return sum(value[:1].numel() * value.element_size() for value in _tensors(shapes))
        return 0


class PlannedAudioEncoder(AudioEncoder):
    """The audio front end on fake tensors: of all sounds where somebody adapts their tower, else of each size once."""

    live: LiveBytes
    known: MediaTraceCache
    near: torch.Tensor
    adapted: Collection[int] = ()
    handed_down: Callable[[torch.Tensor], None]
    """Receives the gradient of what it returns."""

    def _features(self, pixels: Pixels, wanted: int, batch: Batch) -> torch.Tensor:
        if batch.slots[pixels.segment] in self.adapted:
            features = super()._features(pixels, wanted, batch)
            if features.requires_grad:
                features.register_hook(self.handed_down)
            return features
        key = "audio", self._processor.sizes(pixels.media.items)
        if key not in self.known.frozen:
            before = self.live.now
            with self.live.apart() as phase:
                made = super()._features(pixels, wanted, batch)
            self.known.frozen[key] = (made.shape[1:], made.dtype), phase.bytes - before
            del made
        (shape, dtype), peak = self.known.frozen[key]
        self.live.peak = max(self.live.peak, self.live.now + peak)
        return self.near.new_empty((wanted, *shape), dtype=dtype)

    def bytes_of_token(self) -> int:
        """As of a tower."""
        found = (each for (kind, _), (each, _) in self.known.frozen.items() if kind == "audio")
        return next((math.prod(shape) * dtype.itemsize for shape, dtype in found), 0)


class PlannedMediaEncoder(MediaEncoder):
    """The vision and audio front end of a base on fake tensors, and what its towers take."""

    tower = PlannedTower
    audio_encoder = PlannedAudioEncoder

    def __init__(
        self, base: Base, processor: MediaProcessor, kinds: Sequence[str], live: LiveBytes, known: MediaTraceCache
    ) -> None:
        """`known`: what was found out about media of these sizes, by the other simulations of the plan too."""
        super().__init__(base, processor, kinds)
        self._live, self._known = live, known
        self._own: list[PlannedTower] = list(self._towers.values())  # type: ignore[arg-type]  # as `tower` says
        self._planned_audio: PlannedAudioEncoder | None = self._audio_encoder  # type: ignore[assignment]  # as `audio_encoder` says
        for each in (*self._own, *([self._planned_audio] if self._planned_audio else ())):
            each.live, each.known = live, known
            each.near = base.model.get_input_embeddings().weight.detach()
        if self._planned_audio is not None:
            self._planned_audio.handed_down = self._language_is_done
        self.begin()

    def adapts(self, slots: Collection[int]) -> None:
        """These have something on a tower or a projector."""
        for each in (*self._own, *([self._planned_audio] if self._planned_audio else ())):
            each.adapted = slots

    def begin(self) -> None:
        """Forget the last pass."""
        self._peak = self._kept = self._backward = 0
        self._language: int | None = None
        for tower in self._own:
            tower.others = 0

    def blank(self, media: Media) -> dict[str, torch.Tensor]:
        """What the towers are given for a document, but for what its pictures show."""
        blanks, sizes = self._known.blank, self.processor.sizes(media.items)
        if sizes not in blanks:
            found, dtype = self.read(self.processor.blank_inputs(media.items)), self._base.dtype
            blanks[sizes] = {
                name: value.new_empty(1, dtype=dtype).expand(value.shape) if _is_pixels(name, value) else value
                for name, value in found.items()
            }
        return blanks[sizes]

    def bytes_of(self, shown: Sequence[Media], ahead: Sequence[Media]) -> int:
        """Bytes of the pixels of documents that a pass is shown, and of those that wait for the next."""
        with_width = [(media, self._base.dtype.itemsize) for media in shown] + [
            (media, _FLOAT_BYTES) for media in ahead
        ]
        return sum(
            value.numel() * (width if _is_pixels(name, value) else value.element_size())
            for media, width in with_width
            for name, value in self.blank(media).items()
        )

    def bytes_of_features(self, documents: Sequence[Media]) -> int:
        """Bytes of the features of these documents, whose tower nobody adapts."""
        each = {tower.kind: tower.bytes_of_token() for tower in self._own}
        if self._planned_audio is not None:
            each["audio"] = self._planned_audio.bytes_of_token()
        return sum(
            (end - first) * each.get(medium.kind, 0)
            for media in documents
            for (first, end), medium in zip(media.spans, media.inside)
        )

    def options(self, batch: Batch, token: torch.Tensor) -> dict[str, Any]:
        """As of any base, watched."""
        before = self._live.now
        with self._live.apart() as phase:
            found = super().options(batch, token)
        self._peak, self._kept = phase.bytes + self._others, self._live.now - before
        for output in found.get("mm_encoder_outputs", {}).values():
            for each in _tensors(output):
                if each.requires_grad:
                    each.register_hook(self._language_is_done)
        return found

    @property
    def _others(self) -> int:
        return sum(tower.others for tower in self._own)

    def _language_is_done(self, gradient: torch.Tensor) -> None:
        """For this part of the features; what comes after the last is the tower's."""
        del gradient
        self._language = max(self._language or 0, self._live.peak)
        self._live.peak = self._live.now

    def of_language(self, backward: int) -> int:
        """The language model's share of a backward pass whose peak was `backward`, as far as it was seen at its end."""
        if self._language is None:
            return backward
        self._backward = backward + self._others
        return self._language

    def seen(self, before: int) -> tuple[int, int, int]:
        """(kept, peak, peak of the backward pass) of the towers in the pass, above `before`."""
        return self._kept, max(0, self._peak - before), max(0, self._backward - before)


class _Kept(torch.autograd.Function):
    """Features of a document that is not computed, and bytes that are held for it until the backward pass."""

    @staticmethod
    def forward(ctx: Any, trained: torch.Tensor, shape: Sequence[int], like: torch.Tensor, kept: int) -> torch.Tensor:
        del trained
        features = like.new_empty(shape)
        own = features.numel() * features.element_size()
        ctx.save_for_backward(like.new_empty(max(0, kept - own), dtype=torch.uint8))
        return features

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        del ctx, gradients
        return None, None, None, None


def _empty_like(like: Any, rows: int, near: torch.Tensor, kept: int = 0) -> Any:
    """What the tower says of one document, in the form of another's: features of so many tokens. `kept`: bytes of all
    of it, with what its graph keeps, if there is one."""
    first = True

    def made(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal first
        shape, holds, first = (rows, *tensor.shape[1:]), first, False
        if not tensor.requires_grad:
            return near.new_empty(shape, dtype=tensor.dtype)
        trained = near.new_zeros((), requires_grad=True)
        return _Kept.apply(trained, shape, tensor, kept if holds else 0)  # type: ignore[no-any-return]

    return type(like)(**tree_map_only(torch.Tensor, made, dict(like)))


def _tensors(output: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(dict(output)) if isinstance(each, torch.Tensor)]


def _pixels_in(document: Pixels) -> int:
    return sum(value.numel() for name, value in document.tensors.items() if _is_pixels(name, value))


def _is_pixels(name: str, value: torch.Tensor) -> bool:
    shows = name.startswith(_PIXELS) or name == _SPECTRUM
    return shows or (value.is_floating_point() and value.numel() > _VALUES)
