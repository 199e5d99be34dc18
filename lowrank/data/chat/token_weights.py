"""Loss weights of tokens, from the spans of characters that are learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lowrank.data.chat.loss_mask import Sample
from lowrank.data.special_token_escaping import EscapedEncoding
from lowrank.segments import Media, Segment


def frame_of(tokenizer: Any) -> np.ndarray:
    """(P) what the tokenizer puts before a text by itself, e.g. BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    for place in range(len(framed) - len(bare) + 1):
        if framed[place : place + len(bare)] == bare:
            return np.asarray(framed[:place], np.int32)
    return np.zeros(0, np.int32)


def encode(tokenizer: Any, samples: Sequence[Sample]) -> list[Any]:
    """One encoding each (`ids`, `char_to_token`); what only spells control tokens as text.

    Never with the tokenizer's own special tokens: a chat template writes BOS itself, or means to have none."""
    if not samples:
        return []
    encodings = tokenizer(
        [sample.text for sample in samples],
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    ).encodings
    return [
        EscapedEncoding(tokenizer, sample.text, sample.spelled) if sample.spelled else encoding
        for sample, encoding in zip(samples, encodings)
    ]


def weigh(sample: Sample, encoded: Any) -> Segment:
    """Tokens and weights: a token is learned if any of its characters is."""
    tokens = np.asarray(encoded.ids, np.int32)
    weights = np.zeros(len(tokens), np.float32)
    for start, end in sample.learned:
        first = _token_from(encoded, start, end)
        if first is not None:
            weights[first : _token_after(encoded, end, len(sample.text), len(tokens))] = 1.0
    weights[:1] = 0.0  # nothing comes before the first token
    media = None
    if sample.places:
        spans = tuple(_tokens_of(encoded, place) for place, _ in sample.places)
        for first, end in spans:
            weights[first:end] = 0.0  # what stands for a medium is nothing to say
        media = Media(tuple(medium for _, medium in sample.places), spans)
    return Segment(tokens, weights, media=media)


def _tokens_of(encoded: Any, place: tuple[int, int]) -> tuple[int, int]:
    """The tokens of the characters [start, end), all of which belong to some."""
    first, last = encoded.char_to_token(place[0]), encoded.char_to_token(place[1] - 1)
    assert first is not None, "placeholders are tokens"
    assert last is not None, "placeholders are tokens"
    return first, last + 1


def _token_from(encoded: Any, start: int, end: int) -> int | None:
    """The first token with a character in [start, end); white space may belong to no token."""
    for place in range(start, end):
        token = encoded.char_to_token(place)
        if token is not None:
            return token
    return None


def _token_after(encoded: Any, end: int, length: int, num_tokens: int) -> int:
    """One past the last token with a character before `end`."""
    last = next((t for p in range(end - 1, -1, -1) if (t := encoded.char_to_token(p)) is not None), -1)
    follows = next((t for p in range(end, length) if (t := encoded.char_to_token(p)) is not None), num_tokens)
    return max(last + 1, follows)


def without_tail(segment: Segment) -> Segment:
    """Without the tokens after the last learned one: they cannot change any loss."""
    learned = np.flatnonzero(segment.weight_L)
    end = int(learned[-1]) + 1 if len(learned) else 0
    media = segment.media and segment.media.between(0, end)
    return replace(segment, token_L=segment.token_L[:end], weight_L=segment.weight_L[:end], media=media)


def framed(part: Segment, prefix: np.ndarray, end: int | None) -> Segment:
    """Plain text between what the tokenizer puts before it (BOS, never twice) and a learned EOS."""
    tokens = part.token_L
    if len(prefix) and not np.array_equal(tokens[: len(prefix)], prefix):
        tokens = np.concatenate([prefix, tokens])
    if end is not None and len(part) and tokens[-1] != end:
        tokens = np.concatenate([tokens, np.asarray([end], tokens.dtype)])
    weights = np.ones(len(tokens), np.float32)
    weights[: max(1, len(prefix))] = 0.0
    return Segment(tokens, weights)
