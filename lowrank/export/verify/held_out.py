"""The documents on which an export is compared with what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig, SourceConfig
from lowrank.data.dataset import open_datasets, read_samples
from lowrank.data.prepare import prepare
from lowrank.data.sources.memory import title_of
from lowrank.errors import DataError
from lowrank.records import Conversation, Message
from lowrank.segments import Segment

_ROWS_LOOKED_AT = 512
_TOKENS_OF_ONE = 512
_MOST_TOKENS_OF_ONE = 2048
_TOKENS_BEFORE = 384
"""Of these at most before the answer: questions with pictures, or with long texts, have thousands."""
_PROMPTS = 8
QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "用一句话说明什么是机器学习。",
    "Write a Python function that reverses a string.",
    "List three uses of a paper clip.",
    "把下面的句子翻译成英文：今天天气很好，我们去公园吧。",
    "What is 17 * 23? Answer with the number only.",
    "Summarize: The meeting was moved from Tuesday to Friday because the room was taken.",
    'Return {"name": "Ada", "age": 36} as YAML.',
)
"""Asked where none of the data a model was trained on is at hand."""


@dataclass(frozen=True)
class HeldOut:
    """What the two sides are asked.

    documents   (L) int64 tokens each
    compared    (L) bool each: true at the place before each token that an answer has
    prompts     (L) int64 each: some of the same documents up to their first answer, to be continued
    """

    documents: tuple[np.ndarray, ...]
    compared: tuple[np.ndarray, ...]
    prompts: tuple[np.ndarray, ...]
    origin: str
    """What they are, for people."""


def from_data(data: DataConfig, renderer: Renderer, record: type, seed: int, *, documents: int) -> HeldOut:
    """Held-out rows of a run's data; where nothing was held out, rows it was trained on, which `origin` says.

    Raises DataError if the data is not there any more.
    """
    if data.eval:
        segments, what = _first_rows(data.eval, data, renderer, record, seed, "data.eval"), "held-out rows"
    elif data.validation_split and not data.streaming:
        held = prepare(data, tokenizer=renderer.tokenizer, record=record, seed=seed).eval
        segments, what = held, "held-out rows"
    else:
        segments = _first_rows(data.train, data, renderer, record, seed, "data.train")
        what = "training rows (none were held out)"
    segments = [segment for segment in segments if segment.weight_L[1:].any()]
    if not segments:
        raise DataError("no usable row")
    step = max(1, len(segments) // documents)
    return from_segments(segments[::step][:documents], what)


def from_source(source: SourceConfig, renderer: Renderer, seed: int, *, documents: int) -> HeldOut:
    """Rows of the user's, in any format that training reads."""
    data = renderer.config.model_copy(update={"eval": ()})
    segments = _first_rows((source,), data, renderer, None, seed, "prompts")
    return from_segments(
        segments[:: max(1, len(segments) // documents)][:documents], f"rows of {title_of(source.path, 'prompts')}"
    )


def training_documents(
    data: DataConfig, renderer: Renderer, record: type, seed: int, count: int
) -> tuple[Segment, ...]:
    """The beginnings of rows that a run was trained on, with their pictures; none if the data is not there any more.
    They have no more than `count` times 512 tokens together."""
    try:
        segments = _first_rows(data.train, data, renderer, record, seed, "data.train")
    except DataError:
        return ()
    step = max(1, len(segments) // count)
    beginnings = [beginning(segment) for segment in segments[::step][:count]]
    ends = np.cumsum([len(each) for each in beginnings])
    return tuple(each for each, end in zip(beginnings, ends) if len(each) and end <= count * _TOKENS_OF_ONE)


def beginning(segment: Segment) -> Segment:
    """Its first 512 tokens; those that stand for pictures come on top, up to 2048 in all. No picture is cut in two."""
    text_L = np.ones(len(segment), bool)
    for first, end in segment.media.spans if segment.media is not None else ():
        text_L[first:end] = False
    end = min(int(np.searchsorted(np.cumsum(text_L), _TOKENS_OF_ONE + 1)), _MOST_TOKENS_OF_ONE, len(segment))
    if segment.media is not None:
        end = segment.media.whole_until(end)
    return Segment(
        np.asarray(segment.token_L[:end], np.int64),
        segment.weight_L[:end],
        media=None if segment.media is None else segment.media.between(0, end),
        prompt=None if segment.prompt is None else min(segment.prompt, end),
    )


def from_questions(renderer: Renderer, *, chat: bool) -> HeldOut:
    """Questions that need no data; as plain text where there is no chat template. Their answers are still to be given:
    export/verify/compare.py takes those of base + adapter.
    """
    if chat:
        prompts = [renderer.prompt(Conversation((Message("user", question),))) for question in QUESTIONS]
    else:
        prompts = [np.asarray(renderer.tokenizer(question)["input_ids"], np.int64) for question in QUESTIONS]
    empty = tuple(np.zeros(len(prompt), bool) for prompt in prompts)
    return HeldOut(tuple(prompts), empty, tuple(prompts), "general questions (the data of the run is not at hand)")


def from_segments(segments: Sequence[Segment], what: str) -> HeldOut:
    """Documents with answers; the place before each token that carries loss is compared. Of a document whose answer
    is far behind, the part that ends with it: both sides read the same. DataError where nothing has an answer."""
    documents, compared, prompts = [], [], []
    for segment in segments:
        if not segment.weight_L[1:].any():
            continue
        begin = max(0, int(np.argmax(segment.weight_L > 0)) - _TOKENS_BEFORE)
        token_L = segment.token_L[begin : begin + _TOKENS_OF_ONE]
        weight_L = segment.weight_L[begin : begin + _TOKENS_OF_ONE]
        first = int(np.argmax(weight_L > 0))
        documents.append(np.asarray(token_L, np.int64))
        compared.append(np.append(weight_L[1:] > 0, False))
        prompts.append(np.asarray(token_L[: max(1, first)], np.int64))
    if not documents:
        raise DataError(f"no usable row: none of the {what} has an answer")
    return HeldOut(tuple(documents), tuple(compared), tuple(prompts[:_PROMPTS]), f"{len(documents)} {what}")


def _first_rows(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    renderer: Renderer,
    record: type | None,
    seed: int,
    given_as: str,
) -> list[Segment]:
    """Segments of the first rows of each source."""
    settings = data.model_copy(update={"train": tuple(sources), "eval": (), "streaming": True, "max_samples": None})
    segments: list[Segment] = []
    for dataset in open_datasets(settings, record, seed, None, given_as=given_as):
        rows = read_samples(dataset, renderer, dataset.row_counts(), limit=_ROWS_LOOKED_AT)
        segments += [sample[0] for _, samples in islice(rows, _ROWS_LOOKED_AT) for sample in samples]
    return segments
