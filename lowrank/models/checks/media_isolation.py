"""The isolation check of media: a base that is to be shown pictures or played sounds is tried out with made-up ones
before it trains.

Text alone says nothing here: models whose pictures' tokens see one another both ways (Gemma 3) pass the test of text,
whether attention is told of the pictures or not.
Documents with media, packed, must give what transformers makes of each alone, with its own attention, masks and
positions; another picture or sound in one document must move that document and not a bit of its neighbors.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lowrank.batches import BASE_SLOT, pack
from lowrank.errors import LowrankError, ModelError
from lowrank.kernels.accelerators import wide
from lowrank.media.audio import examine_audio, made_up_wav
from lowrank.media.decoding import examine, from_pillow
from lowrank.media.processor import MediaProcessor
from lowrank.media.video import video_of
from lowrank.models.attention.packed import BoundariesMissing
from lowrank.models.base import Base
from lowrank.models.checks.isolation import MODEL_ERRORS, distance, narrow_windows, one_token_at_a_time, tolerance
from lowrank.models.media_encoder import MediaEncoder
from lowrank.records import KIND_NAMES, Medium, Picture
from lowrank.segments import Media, Segment

_FIXED = "questions with {names} are answered in fixed batches, which is slower: {reason}"
_SIZES = ((96, 64), (48, 112))
_SECONDS = (0.7, 0.4)
_FRAMES = (4, 3)
_BEFORE, _AFTER = "Look at this", "and say what it shows"
_ANSWER = 3
"""How many of a document's last tokens are no prompt, of what is made up for a prefix language model."""


def give_media_encoder(
    base: Base,
    processor: MediaProcessor,
    wanted: str = "auto",
    *,
    kinds: Sequence[str] = ("image",),
    may_change_layout: bool = True,
    answering: bool = False,
) -> str | None:
    """Let `base` be given media of these kinds, in a layout that keeps documents with them apart; the sentence to tell
    the user, or None. `wanted` is the setting model.attention; `may_change_layout` False: the layout it has must do.
    `answering`: nothing is trained; where documents with media cannot be packed, texts still are.

    ModelError if none holds.
    """
    earlier, names = base.media_encoder, " and ".join(KIND_NAMES[kind] for kind in kinds)
    base.media_encoder = MediaEncoder(base, processor, kinds)
    both_ways = "their tokens see one another both ways" if base.media_encoder.both_ways else None
    try:
        reason = _what_leaks(base)
    except LowrankError:  # as where torchvision is missing
        base.media_encoder = earlier
        raise
    if base.shift_attn is not None and (reason or both_ways):
        base.media_encoder = earlier
        raise ModelError(
            f"model.shift_attn: {base.name} cannot be given {names} in groups of tokens, which are read from left to "
            f"right in one stream ({reason or both_ways}); leave shift_attn out"
        )
    if reason is None:
        return _FIXED.format(names=names, reason=both_ways) if answering and both_ways else None
    before = base.layout
    if answering and before == "packed":
        return _apart_from_texts(base, names, reason, earlier)
    if before == "padded" or wanted == "packed" or not may_change_layout:
        base.media_encoder = earlier
        raise ModelError(f"{base.name} cannot be given {names} in the {before} layout: {reason}")
    base.set_layout("padded")
    padded_reason = _what_leaks(base)
    if padded_reason is not None:
        base.media_encoder = earlier
        base.set_layout(before)
        raise ModelError(
            f"{base.name} ({base.model.config.model_type}) cannot be trained on {names}: packed, {reason}; padded, "
            f"{padded_reason}; leave rows with {names} out"
        )
    return f"with {names} this model runs one document per padded row, which is slower: packed, {reason}"


def _apart_from_texts(base: Base, names: str, reason: str, earlier: MediaEncoder | None) -> str:
    """Media in padded rows beside packed texts; the sentence to tell the user. ModelError if that does not hold."""
    assert base.media_encoder is not None
    base.media_encoder.padded = True
    padded_reason = _what_leaks(base)
    if padded_reason is not None:
        base.media_encoder = earlier
        raise ModelError(f"{base.name} does not accept {names}: packed, {reason}; padded, {padded_reason}")
    return _FIXED.format(names=names, reason=f"packed, {reason}")


def _what_leaks(base: Base) -> str | None:
    """None if all is well with every kind, else what happened, in words."""
    assert base.media_encoder is not None
    return next(filter(None, (_what_leaks_of(base, kind) for kind in base.media_encoder.kinds)), None)


def _what_leaks_of(base: Base, kind: str) -> str | None:
    first, other, one = made_up_documents(base, kind, 0), made_up_documents(base, kind, 1), KIND_NAMES[kind][:-1]
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
    neighbors = torch.cat([moved[: ends[0]], moved[ends[1] :]]), torch.cat([together[: ends[0]], together[ends[1] :]])
    if not torch.equal(*neighbors):
        return f"the {one} of one document changes another (by {distance(*neighbors):.1e})"
    if torch.equal(moved[own], together[own]):
        return f"it makes the same of different {one}s"
    apart = max(distance(together[end - len(each) : end], each) for end, each in zip(ends, alone))
    if not apart <= tolerance(base):
        return f"a document with a {one} gives another result than alone (by {apart:.1e})"
    return None


def made_up_documents(base: Base, kind: str, seed: int = 0) -> list[Segment]:
    """A text, and two documents with a medium of a kind each, for a base that takes some."""
    processor = base.media_encoder.processor if base.media_encoder else None
    assert processor is not None
    tokenizer = processor.own.tokenizer

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    documents = [_segment(ids(_AFTER), None)]
    for number in range(len(_SIZES)):
        medium = _noise(kind, number, seed * len(_SIZES) + number, processor)
        (stands,) = processor.placeholders([medium])
        before, middle = ids(_BEFORE), ids(stands)
        span = (len(before), len(before) + len(middle))
        documents.append(_segment([*before, *middle, *ids(_AFTER)], Media((medium,), (span,))))
    return documents


def _segment(tokens: list[int], media: Media | None) -> Segment:
    prompt = max(1, len(tokens) - _ANSWER)
    return Segment(np.asarray(tokens, np.int64), np.zeros(len(tokens), np.float32), media=media, prompt=prompt)


def _noise(kind: str, number: int, seed: int, processor: MediaProcessor) -> Medium:
    from PIL import Image

    draws = np.random.default_rng(seed)
    if kind == "video":
        frames = [_noise("image", number, 100 * (seed + 1) + place, processor) for place in range(_FRAMES[number])]
        return video_of([frame for frame in frames if isinstance(frame, Picture)])
    if kind == "audio":
        samples_N = draws.uniform(-0.5, 0.5, int(_SECONDS[number] * processor.rate))
        return examine_audio(made_up_wav(samples_N, processor.rate), "a made-up sound")
    width, height = _SIZES[number]
    value = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return examine(from_pillow(Image.fromarray(value)), "a made-up picture")


@torch.no_grad()
def _hidden(base: Base, documents: list[Segment]) -> torch.Tensor:
    return wide(base.hidden(pack([(BASE_SLOT, document) for document in documents]).to(base.device)))


@torch.no_grad()
def _alone(base: Base, document: Segment) -> torch.Tensor:
    """What transformers makes of one document, with nothing of ours but the tokens."""
    assert base.media_encoder is not None
    token_1L = torch.from_numpy(document.token_L)[None].to(base.device)
    given: dict[str, Any] = {"input_ids": token_1L, "attention_mask": torch.ones_like(token_1L)}
    if document.media is not None:
        given |= {name: base.media_encoder.types(token_1L, name) for name in ("mm_token_type_ids", "token_type_ids")}
    given |= base.types_of_prompts([document.prompt_length], token_1L)
    if document.media is not None:
        inputs = base.media_encoder.cast(base.media_encoder.processor.inputs(document.media.items))
        given |= {name: value.to(base.device) for name, value in inputs.items() if name not in given}
    takes = inspect.signature(base.backbone.forward).parameters
    given = {name: value for name, value in given.items() if name in takes}
    with base.using_attention(base.own_attention):
        return wide(base.backbone(**given, use_cache=False).last_hidden_state[0])
