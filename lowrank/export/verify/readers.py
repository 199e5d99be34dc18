"""Models in this process as an `ExportReader`: a base with an adapter, or a folder that transformers loads."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.adapters.routing import ForwardContext
from lowrank.batches import BASE_SLOT, pack
from lowrank.checkpoints.peft_layout import AdapterOnDisk
from lowrank.errors import ModelError
from lowrank.export import ImageQuestion
from lowrank.export.source import Source
from lowrank.generate.request import TokenChunk
from lowrank.generate.sampler import GenerationConfig, Prompt, answer_all
from lowrank.media.decoding import examine, from_pillow
from lowrank.media.limits import MediaLimits
from lowrank.media.processor import MediaProcessor, processor_of
from lowrank.models.base import Base
from lowrank.models.checks.media_isolation import give_media_encoder
from lowrank.models.config import ModelConfig
from lowrank.models.media_encoder import MediaEncoder
from lowrank.models.storages.dense import DenseConfig
from lowrank.records import Picture
from lowrank.segments import Media, Segment

NO_TOWER = "it has no tower for pictures, or not the files of its processor"
_AS_SERVED = MediaLimits(image_max_pixels=1 << 62, image_min_pixels=1)
"""Of pixels: those alone that the files of a processor have."""
_LOGITS_AT_ONCE = 1 << 24
"""Elements of the (rows, V) blocks of logits."""


class BankReader:
    """A base and one slot of its bank (-1: the base alone). `processor`: of the media that the base may be shown."""

    def __init__(self, base: Base, bank: Bank, slot: int = BASE_SLOT, processor: MediaProcessor | None = None) -> None:
        self.base = base
        self.bank = bank
        self.slot = slot
        self._processor = processor

    def logprobs(self, token_L: np.ndarray, prompt: int | None = None) -> np.ndarray:
        """See `ExportReader`."""
        document = Segment(token_L, np.zeros(len(token_L), np.float32), prompt=prompt)
        segment = self.bank.with_virtual_tokens(self.slot, document)
        batch = pack([(self.slot, segment)]).to(self.base.device)
        with torch.no_grad():
            hidden_LD = self.bank.hidden(batch)[segment.virtual :]
            head = self.bank.head(self.slot)
            step = max(1, _LOGITS_AT_ONCE // head.weight_VD.shape[0])
            blocks = [head.logits(part).log_softmax(-1).float().cpu() for part in hidden_LD.split(step)]
        return torch.cat(blocks).numpy()

    @property
    def media_encoder(self) -> MediaEncoder:
        """By which it is shown pictures, tried out the first time. ModelError where it cannot be shown any."""
        if self._processor is None or not self._processor.supports_images:
            raise ModelError(NO_TOWER)
        return self._taking(["image"])

    def take_media_of(self, documents: Sequence[Segment]) -> None:
        """Be given what these documents show and play, which is tried out now. ModelError where that cannot be."""
        kinds = {each.kind for document in documents if document.media for each in document.media.inside}
        if kinds:
            self._taking(sorted(kinds))

    def _taking(self, kinds: Sequence[str]) -> MediaEncoder:
        known = () if self.base.media_encoder is None else self.base.media_encoder.kinds
        if not set(kinds) <= set(known):
            assert self._processor is not None, "it has made the documents"
            give_media_encoder(self.base, self._processor, kinds=sorted({*kinds, *known}), answering=True)
        assert self.base.media_encoder is not None
        return self.base.media_encoder

    def image_logprobs(self, question: ImageQuestion) -> tuple[np.ndarray, int]:
        """See `ImageReader`."""
        picture, token_P = self._picture(question.pixels_HWC)
        token_L = np.concatenate([question.before_L, token_P, question.after_L])
        first = len(question.before_L)
        media = Media((picture,), ((first, first + len(token_P)),))
        prompt = len(token_L) - (question.rows - 1)
        document = Segment(token_L, np.zeros(len(token_L), np.float32), media=media, prompt=prompt)
        return self.logprobs_shown(document, question.rows), len(token_P)

    def features(self, pixels_HWC: np.ndarray) -> np.ndarray:
        """All that the tower says of a picture, (F) float32."""
        picture, token_P = self._picture(pixels_HWC)
        media = Media((picture,), ((0, len(token_P)),))
        with torch.no_grad(), self.bank.routing.using(ForwardContext()):
            output = self.media_encoder.encode(token_P, media, self.slot).output
        found = [each.flatten().float().cpu() for each in tree_leaves(dict(output)) if isinstance(each, torch.Tensor)]
        return torch.cat(found).numpy()

    def _picture(self, pixels_HWC: np.ndarray) -> tuple[Picture, np.ndarray]:
        """As a medium, and (P) int64 tokens from the first to the last that stands for it."""
        from PIL import Image

        processor, token = self.media_encoder.processor, self.media_encoder.token
        picture = examine(from_pillow(Image.fromarray(pixels_HWC)), "it")
        (stands,) = processor.placeholders([picture])
        token_P = np.asarray(processor.own.tokenizer(stands, add_special_tokens=False)["input_ids"], np.int64)
        places = np.flatnonzero(token_P == token)
        return picture, token_P[places[0] : places[-1] + 1]

    def logprobs_shown(self, document: Segment, rows: int) -> np.ndarray:
        """Of a document with its pictures, after each of its last `rows` tokens: (rows, V) float32."""
        self.take_media_of([document])
        batch = pack([(self.slot, self.bank.with_virtual_tokens(self.slot, document))])
        if self.base.media_encoder is not None:
            batch = self.base.media_encoder.ready(batch)
        batch = batch.to(self.base.device)
        with torch.no_grad():
            hidden_KD = self.bank.hidden(batch)[-rows:]
            return self.bank.head(self.slot).logits(hidden_KD).log_softmax(-1).float().cpu().numpy()

    def greedy(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        on_answered: Callable[[int], None],
    ) -> list[list[int]]:
        """See `ExportReader`."""
        answered: set[int] = set()

        def on_chunk(index: int, chunk: TokenChunk) -> None:
            if chunk.finish is not None:
                answered.add(index)
                on_answered(len(answered))

        requests = [Prompt(token_L, self.slot) for token_L in prompts]
        answers = answer_all(
            self.base,
            self.bank,
            requests,
            GenerationConfig(max_new_tokens=max_new_tokens),
            stop_tokens=stop_tokens,
            rows_at_once=None,
            on_chunk=on_chunk,
        )
        return [answer.tokens for answer in answers]

    def __enter__(self) -> BankReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.base, self.bank
        gc.collect()  # modules and their hooks refer to one another


def read_adapter(source: Source, adapter: AdapterOnDisk | None) -> BankReader:
    """The source's base, loaded with an adapter (None: alone) in `source.model`'s dtype and on its device."""
    model = source.model.model_copy(update={"path": str(source.base), "revision": None})
    reader = _load(model, source, processor_of(source.tokenizer))
    if adapter is not None:
        reader.slot = reader.bank.add(adapter.config, seed=0)
        reader.bank.load(reader.slot, adapter.tensors)
    return reader


def read_model(source: Source, folder: Path) -> BankReader:
    """A model in transformers' layout, on the source's device and in its dtype."""
    own = source.model.model_copy(update={"path": str(folder), "revision": None})
    return _load(own, source, MediaProcessor(str(folder), None, source.tokenizer, _AS_SERVED))


def _load(model: ModelConfig, source: Source, processor: MediaProcessor | None) -> BankReader:
    # Dense: the weights that are exported are those on disk, whatever training kept them in.
    model = model.model_copy(update={"storage": DenseConfig(), "activation_checkpointing": "none"})
    base = loading.load(model, tokenizer=source.tokenizer, notify=lambda text: None)
    return BankReader(base, Bank(base), processor=processor)
