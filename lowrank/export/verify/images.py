"""One question about one picture: does the export see in it what base + adapter sees?

The picture is made here, and of the size that the model's processor makes all pictures, so that nobody resizes it:
programs resize by different means, and what is compared are the tower and the places of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lowrank.data.chat.rendering import Renderer
from lowrank.errors import DataError, ModelError
from lowrank.export import ExportReader, ImageQuestion, ImageReader, ReadBack
from lowrank.export.verify.compare import Comparison, build_comparison, kl_of
from lowrank.export.verify.readers import BankReader
from lowrank.generate.request import GenerationConfig, Prompt, RequestError
from lowrank.generate.sampler import generate
from lowrank.media.decoding import examine, from_pillow
from lowrank.media.processor import MediaProcessor
from lowrank.records import Conversation, Message
from lowrank.segments import Segment

_QUESTION = "What is to be seen in this picture?"
_NEW_TOKENS = 16
_TOWER_OFF = 0.1
_TOWER_LOST = 0.5
_NOTHING = 1e-4
"""Of what the tower says, a change that is none: float32 on another path."""
_SIDE = 224
"""Pixels, of processors that keep the size of a picture; a multiple of the patches of all that are known."""


@dataclass(frozen=True)
class ImageAnswer:
    """What base + adapter answered to a question about a picture."""

    question: ImageQuestion
    logprob_KV: np.ndarray
    """(K, V) float32, at the end of the question and after each token of the answer."""
    base_logprob_KV: np.ndarray | None
    """The same of the bare base; None where there is no adapter."""
    features_F: np.ndarray
    """What its tower says of the picture, and the next what the bare base's does."""
    base_features_F: np.ndarray


def reference_image_answer(reader: BankReader, renderer: Renderer, stop_tokens: frozenset[int]) -> ImageAnswer:
    """Raises LowrankError where this model cannot be asked about pictures here."""
    from PIL import Image

    pixels_HWC = synthetic_image(_side(reader.media_encoder.processor))
    picture = examine(from_pillow(Image.fromarray(pixels_HWC)), "it")
    conversation = Conversation((Message("user", _QUESTION, media=((0, picture),)),))
    segment = renderer.prompt_segment(conversation)
    try:
        prompt = Prompt(segment.token_L, reader.slot, segment.media)
        config = GenerationConfig(max_new_tokens=_NEW_TOKENS)
        (answer,) = generate(reader.base, reader.bank, [prompt], config, stop_tokens=stop_tokens)
    except RequestError as error:
        raise DataError(str(error)) from error
    token_L = np.append(segment.token_L, np.asarray(answer, np.int64))
    document = Segment(token_L, np.zeros(len(token_L), np.float32), media=segment.media, prompt=len(segment))
    (place_P,) = np.nonzero(segment.token_L == reader.media_encoder.token)
    if not len(place_P):
        raise ModelError("no token of its question stands for the picture")
    first, end = int(place_P[0]), int(place_P[-1]) + 1
    rows = len(answer) + 1
    question = ImageQuestion(token_L[:first], pixels_HWC, end - first, token_L[end:], rows)
    own = reader.logprobs_shown(document, rows)
    bare = BankReader(reader.base, reader.bank, processor=reader.media_encoder.processor)
    unadapted = None if reader.slot == bare.slot else bare.logprobs_shown(document, rows)
    return ImageAnswer(question, own, unadapted, reader.features(pixels_HWC), bare.features(pixels_HWC))


def compare_images(read_back: ReadBack, reader: ExportReader, answer: ImageAnswer) -> Comparison:
    """Ask the opened export the same question, and compare its log-probabilities within its tolerance."""
    assert isinstance(reader, ImageReader)
    own_KV, length = reader.image_logprobs(answer.question)
    name = f"{read_back.name}, asked about a picture" if read_back.compares_text else read_back.name
    read_back = replace(read_back, name=name, against=None)
    answer_K = answer.logprob_KV.argmax(1)
    bare = None if answer.base_logprob_KV is None else _losses(answer.base_logprob_KV, answer_K)
    same_K = own_KV.argmax(1) == answer_K
    found = build_comparison(
        read_back,
        kl_K=kl_of(answer.logprob_KV, own_KV),
        same_K=same_K,
        loss_N=_losses(own_KV, answer_K),
        reference_N=_losses(answer.logprob_KV, answer_K),
        base_loss=None if bare is None else float(bare.mean()),
        greedy=(int(same_K.all()), 1),
    )
    height, width, _ = answer.question.pixels_HWC.shape
    problem = None
    if length != answer.question.length:
        problem = (
            f"{length} tokens stand for a picture of {width} x {height} there, {answer.question.length} in training"
        )
    elif isinstance(reader, BankReader):
        problem = _lost_by_tower(answer, reader.features(answer.question.pixels_HWC))
    return replace(found, problems=(problem, *found.problems)) if problem else found


def _lost_by_tower(answer: ImageAnswer, own_F: np.ndarray) -> str | None:
    """What of the tower is not the trained one's, in words. What it says is compared by itself: an answer may depend on
    it by less than rounding to 16 bits moves it."""
    off, length = np.linalg.norm(own_F - answer.features_F), np.linalg.norm(answer.features_F)
    gained = np.linalg.norm(answer.base_features_F - answer.features_F)
    if not off <= _TOWER_OFF * length:
        return f"what its tower says of the picture is off by {off / length:.1%}, at most {_TOWER_OFF:.0%} is expected"
    if gained > _NOTHING * length and off > _TOWER_LOST * gained:
        return (
            f"{off / gained:.0%} of what training changed in what its tower says of the picture is lost, at most "
            f"{_TOWER_LOST:.0%} is expected"
        )
    return None


def synthetic_image(side: int) -> np.ndarray:
    """(side, side, 3) uint8: areas and a slope, no two quarters alike."""
    pixels_HWC = np.zeros((side, side, 3), np.uint8)
    pixels_HWC[:, :, 0] = np.linspace(0, 255, side, dtype=np.uint8)[None]
    pixels_HWC[side // 6 : side // 2, side // 3 : side * 5 // 6, 1] = 220
    pixels_HWC[side // 2 :, : side // 3, 2] = 180
    return pixels_HWC


def _side(processor: MediaProcessor) -> int:
    """Of a square picture that the processor leaves as large as it is, as far as training's limits let it come."""
    side, step = _own_side(processor.own.image_processor)
    within, _ = processor.limits.of_picture(side, side)
    return -(-within // step) * step if within > side else max(step, within // step * step)


def _own_side(images: Any) -> tuple[int, int]:
    """The side for an image processor, and what sides are multiples of."""
    for name in ("crop_size", "size"):
        height = _number(getattr(images, name, None), "height")
        if height and height == _number(getattr(images, name, None), "width"):
            return height, 1
    step = _number(getattr(images, "patch_size", None), "height") or 1
    step *= (getattr(images, "merge_size", None) or 1) * (getattr(images, "pooling_kernel_size", None) or 1)
    longest, shortest = (_number(getattr(images, "size", None), key) for key in ("longest_edge", "shortest_edge"))
    if longest and shortest:  # of a processor that has both they are numbers of pixels in all
        longest = math.isqrt(longest)
    return max(step, min(_SIDE, longest or _SIDE) // step * step), step


def _number(size: Any, key: str) -> int:
    """Of a processor's size, which is a number, a mapping or an object with such fields; 0 where it has none."""
    if isinstance(size, int):
        return size
    return int((size.get(key) if isinstance(size, Mapping) else getattr(size, key, None)) or 0)


def _losses(logprob_KV: np.ndarray, answer_K: np.ndarray) -> np.ndarray:
    return -logprob_KV[np.arange(len(answer_K)), answer_K].astype(np.float64)
