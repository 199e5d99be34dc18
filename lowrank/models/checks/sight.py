"""The isolation check of pictures: a base that is to be shown some is tried out with made-up ones before it trains.

Text alone says nothing here: models whose pictures' tokens see one another both ways (Gemma 3) pass the test of text.
Documents with pictures, packed, must give what transformers makes of each alone, with its own attention, masks and
positions; another picture in one document must move that document and not a bit of its neighbours.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from lowrank.batches import BARE_BASE, Media, Segment, pack
from lowrank.errors import LowrankError, ModelError
from lowrank.kernels.accelerators import wide
from lowrank.media.decoding import examine, from_pillow
from lowrank.media.processor import PictureProcessor
from lowrank.models.attention.packed import BoundariesMissing
from lowrank.models.base import Base
from lowrank.models.checks.isolation import MODEL_ERRORS, distance, narrow_windows, one_token_at_a_time, tolerance
from lowrank.models.sight import Sight
from lowrank.records import Picture

_SIZES = ((96, 64), (48, 112))
_BEFORE, _AFTER = "Look at this", "and say what it shows"


def give_sight(base: Base, processor: PictureProcessor, wanted: str = "auto", *, settle: bool = True) -> str | None:
    """Let `base` be shown pictures, in a layout that keeps documents with them apart; the sentence to tell the user, or
    None. `wanted` is the setting model.attention; `settle` False: the layout it has must do.

    ModelError if none holds.
    """
    base.sight = Sight(base, processor)
    reason = _what_leaks(base)
    if reason is None:
        return None
    before = base.layout
    if before == "padded" or wanted == "packed" or not settle:
        base.sight = None
        raise ModelError(f"{base.name} cannot be shown pictures in the {before} layout: {reason}")
    base.settle("padded")
    padded_reason = _what_leaks(base)
    if padded_reason is not None:
        base.sight = None
        base.settle(before)
        raise ModelError(
            f"{base.name} ({base.model.config.model_type}) cannot be trained on pictures: packed, {reason}; padded, "
            f"{padded_reason}; leave rows with pictures out"
        )
    return f"with pictures this model runs one document per padded row, which is slower: packed, {reason}"


def _what_leaks(base: Base) -> str | None:
    """None if all is well, else what happened, in words."""
    assert base.sight is not None
    first, other = made_up_documents(base, 0), made_up_documents(base, 1)
    try:
        with narrow_windows(base.model), one_token_at_a_time(base):
            together = _hidden(base, first)
            moved = _hidden(base, [first[0], other[1], first[2]])
            alone = [_alone(base, document) for document in first]
    except BoundariesMissing:
        return "its attention does not receive the document boundaries"
    except LowrankError:
        raise
    except MODEL_ERRORS as error:
        return f"it does not run so ({type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''})"
    ends = np.cumsum([len(document) for document in first]).tolist()
    own = slice(ends[0], ends[1])
    neighbours = torch.cat([moved[: ends[0]], moved[ends[1] :]]), torch.cat([together[: ends[0]], together[ends[1] :]])
    if not torch.equal(*neighbours):
        return f"the picture of one document changes another (by {distance(*neighbours):.1e})"
    if torch.equal(moved[own], together[own]):
        return "it makes the same of different pictures"
    apart = max(distance(together[end - len(each) : end], each) for end, each in zip(ends, alone))
    if not apart <= tolerance(base):
        return f"a document with a picture gives another result than alone (by {apart:.1e})"
    return None


def made_up_documents(base: Base, seed: int = 0) -> list[Segment]:
    """A text, and two documents with a picture each, for a base that is shown some."""
    processor = base.sight.processor if base.sight else None
    assert processor is not None
    tokenizer = processor.own.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    documents = [_segment(ids(_AFTER), None)]
    for number, size in enumerate(_SIZES):
        picture = _noise(size, seed * len(_SIZES) + number)
        (stands,) = processor.placeholders([(picture.width, picture.height)])
        before, middle = ids(_BEFORE), ids(stands)
        span = (len(before), len(before) + len(middle))
        documents.append(_segment([*before, *middle, *ids(_AFTER)], Media((picture,), (span,))))
    return documents


def _segment(tokens: list[int], media: Media | None) -> Segment:
    return Segment(np.asarray(tokens, np.int64), np.zeros(len(tokens), np.float32), media=media)


def _noise(size: tuple[int, int], seed: int) -> Picture:
    from PIL import Image

    value = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return examine(from_pillow(Image.fromarray(value)), "a made-up picture")


@torch.no_grad()
def _hidden(base: Base, documents: list[Segment]) -> torch.Tensor:
    return wide(base.hidden(pack([(BARE_BASE, document) for document in documents]).to(base.device)))


@torch.no_grad()
def _alone(base: Base, document: Segment) -> torch.Tensor:
    """What transformers makes of one document, with nothing of ours but the tokens."""
    assert base.sight is not None
    token_1L = torch.from_numpy(document.token_L)[None].to(base.device)
    given: dict[str, Any] = {"input_ids": token_1L, "attention_mask": torch.ones_like(token_1L)}
    if document.media is not None:
        seen = (token_1L == base.sight.token).long()
        given |= {"mm_token_type_ids": seen, "token_type_ids": seen}
        inputs = base.sight.processor.inputs(document.media.pictures)
        given |= {
            name: (value.to(base.dtype) if value.is_floating_point() else value).to(base.device)
            for name, value in inputs.items()
            if name not in given
        }
    takes = inspect.signature(base.backbone.forward).parameters
    given = {name: value for name, value in given.items() if name in takes}
    with base.using_attention(base.own_attention):
        return wide(base.backbone(**given, use_cache=False).last_hidden_state[0])
