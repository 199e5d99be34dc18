"""Sounds for a base: each document's own go through the front of transformers' model by themselves, and the features
that it makes of them replace the embeddings of their tokens in the flat stream (models/embedding_hook.py)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from lowrank.batches import Batch, Pixels
from lowrank.errors import ModelError
from lowrank.media.processor import MediaProcessor
from lowrank.models.embedding_hook import EmbeddingHook
from lowrank.models.layers import language_model
from lowrank.models.shared_features import SharedFeatures
from lowrank.models.tower import TowerPass, span_of, token_of
from lowrank.records import Audio
from lowrank.segments import Media


class AudioEncoder:
    """The audio front end of one base. `others`: tensors of a processor that are read elsewhere."""

    def __init__(
        self,
        name: str,
        model: Any,
        backbone: Any,
        processor: MediaProcessor,
        others: set[str],
        shared: SharedFeatures,
    ) -> None:
        """ModelError for a base that cannot be played sounds."""
        config, language = model.config, language_model(model)[1]
        token = token_of("audio", config)
        if token is None or language in (model, backbone):
            raise ModelError(
                f"{name}: models of type {config.model_type!r} name no token that stands for sounds, so they are "
                "trained without them; leave rows with sounds out"
            )
        self.token = token
        self._name, self._processor, self._shared = name, processor, shared
        self._tokenizer = processor.own.tokenizer
        self._embedding_hook = EmbeddingHook(backbone, language)
        self.wanted = set(self._embedding_hook.forward_parameters) - others

    def options(self, batch: Batch, width: int | None, tower_pass: TowerPass) -> dict[str, Any]:
        """What a forward call is given beside its tokens: `around`, what has to be around it. `width`: of the padded
        layout."""
        rows, features = [], []
        starts = batch.starts
        for each in batch.pixels:
            place_K = self._places(batch, each, starts)
            if len(place_K):
                first = starts[each.segment] if width is None else each.segment * width
                rows.append(place_K + first)
                with tower_pass(each.segment, batch):
                    features.append(self._features(each, len(place_K), batch))
        return {"around": self._embedding_hook.injecting(torch.cat(rows), torch.cat(features))} if rows else {}

    def _places(self, batch: Batch, pixels: Pixels, starts: Sequence[int]) -> torch.Tensor:
        """(K) places in its segment of the tokens that stand for sounds."""
        first, media = starts[pixels.segment], pixels.media
        token_L = batch.token_T[first : starts[pixels.segment + 1]]
        inside_L = torch.zeros(len(token_L), dtype=torch.bool, device=token_L.device)
        for (start, end), medium in zip(media.spans, media.inside):
            if isinstance(medium, Audio):
                inside_L[start:end] = True
        return (inside_L & (token_L == self.token)).nonzero()[:, 0]

    def _features(self, pixels: Pixels, wanted: int, batch: Batch) -> torch.Tensor:
        """(K, D) of the sounds that are in the segment, K `wanted`."""
        media = pixels.media
        sounds = [each for each in media.items if isinstance(each, Audio)]
        ids = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in self._texts(media)]
        counts = [each.count(self.token) for each in ids]
        token_1L = torch.tensor([list(chain.from_iterable(ids))], device=batch.token_T.device)
        given = {name: value for name, value in pixels.tensors.items() if name in self.wanted}

        def listen() -> torch.Tensor:
            return self._embedding_hook.embeddings(token_1L, given)[token_1L[0] == self.token]

        feature_KD = self._shared.of("audio", batch.slots[pixels.segment], media, listen)
        begin, end = span_of("audio", media)
        first = sum(counts[:begin])
        own_KD = feature_KD[first : first + sum(counts[begin:end])]
        if len(own_KD) != wanted or len(sounds) != len(counts):
            names = ", ".join(each.name for each in sounds)
            raise ModelError(
                f"{self._name}: {len(own_KD)} tokens of sounds come from {names} and {wanted} stand for them: its "
                "preprocessor_config.json is of another model"
            )
        return own_KD

    def _texts(self, media: Media) -> list[str]:
        """What stands for each sound of the document."""
        texts = self._processor.placeholders(media.items)
        return [text for text, each in zip(texts, media.items) if isinstance(each, Audio)]
