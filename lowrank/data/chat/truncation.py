"""Sequences longer than `max_length`: cut, left out, cut in pieces, or refused.

truncate   The end is cut, so the prompt stays whole and the answer loses its tail. A sample whose prompt alone fills
           `max_length` is left out: a prompt with its beginning cut off is not what anybody wrote.
drop       Left out.
split      Cut in pieces that are learned on their own. Every piece after the first begins with the BOS token the
           sequence began with, or else with the last token of the piece before, as context; so every token that is
           learned in the whole is learned in exactly one piece. Pieces without one are left out.
error      Left out, and `Rendering.refused` says that this ends the run.

No cut falls into a picture: it comes before one that would not be whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from lowrank.data.chat.rendered_record import Rendering
from lowrank.segments import Segment

Policy = Literal["truncate", "drop", "split", "error"]


def fit(parts: list[Segment], limit: int, policy: Policy, prefix: np.ndarray, *, splittable: bool) -> Rendering:
    """The segments of one record within `limit` tokens; see the module. `prefix` as of `split`; `splittable`: they are
    learned one by one, no pair."""
    longest = max(map(len, parts))
    if longest <= limit:
        return Rendering(tuple(parts))
    if policy in ("drop", "error"):
        return Rendering((), too_long(longest, limit), refused=policy == "error")
    if policy == "split" and splittable:
        pieces = [piece for part in parts for piece in split(part, limit, prefix)]
        return Rendering(tuple(pieces), None if pieces else too_long(longest, limit))
    cut = [truncate(part, limit) for part in parts]
    kept = [segment for segment, _ in cut if segment is not None]
    if not kept or (len(kept) < len(parts) and not splittable):  # a pair needs both its answers
        return Rendering((), f"{too_long(longest, limit)}, and its prompt alone fills that")
    if len(kept) == 2 and kept[0].pair >= 0 and np.array_equal(kept[0].token_L, kept[1].token_L):
        what = too_long(longest, limit)
        return Rendering((), f"equal answers after cutting: {what}, and chosen and rejected differ only beyond")
    lost = sum(len(part) for part in parts) - sum(map(len, kept))
    return Rendering(tuple(kept), truncated_tokens=lost)


def fit_prompt(part: Segment, limit: int, policy: Policy) -> Rendering:
    """A prompt is taken whole or not at all: without its beginning or end it is not what anybody asked."""
    if len(part) > limit:
        return Rendering((), too_long(len(part), limit), refused=policy == "error")
    return Rendering((part,))


def too_long(length: int, max_length: int) -> str:
    """The problem in words."""
    return f"too long: {length} tokens, data.max_length is {max_length}"


def truncate(segment: Segment, max_length: int) -> tuple[Segment | None, int]:
    """The first `max_length` tokens and how many were cut; None if nothing to learn is left."""
    media = segment.media
    end = min(max_length, len(segment)) if media is None else media.whole_until(min(max_length, len(segment)))
    cut = replace(
        segment,
        token_L=segment.token_L[:end],
        weight_L=segment.weight_L[:end],
        media=media and media.between(0, end),
    )
    return (cut if cut.weight_L.any() else None), max(0, len(segment) - end)


def split(segment: Segment, max_length: int, prefix: np.ndarray) -> list[Segment]:
    """Pieces of at most `max_length` tokens; see the module. `prefix` (P) is what the tokenizer begins text with."""
    token_L, weight_L, media = segment.token_L, segment.weight_L, segment.media
    repeat = len(prefix) if len(prefix) and np.array_equal(token_L[: len(prefix)], prefix) else 0
    context = repeat or 1
    if max_length <= context:
        return []
    pieces, at = [], 0
    while at < len(segment):
        end = at + max_length - (context if at else 0)
        if media is not None and end < len(segment):
            end = media.whole_until(end)
            if end <= at:  # a picture alone fills it
                return []
        if at == 0:
            tokens, weights = token_L[:end], weight_L[:end]
            own = media and media.between(0, end)
        else:
            last = at - 1 if media is None else media.before_pictures(at - 1)
            if not repeat and last < 0:
                return []
            head = prefix if repeat else token_L[last : last + 1]
            tokens = np.concatenate([head, token_L[at:end]]).astype(token_L.dtype)
            weights = np.concatenate([np.zeros(context, weight_L.dtype), weight_L[at:end]])
            own = media and media.between(at, end, context)
        at = end
        pieces.append(Segment(tokens, weights, segment.pair, segment.role, media=own))
    return [piece for piece in pieces if piece.weight_L.any()]
