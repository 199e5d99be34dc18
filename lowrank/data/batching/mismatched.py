"""Each prompt with another row's answer, beside the sample itself: from these, KTO estimates how far a model has moved.

The other row is the nearest one before with another prompt (for the first rows, after): rows on one question often
stand together, and an answer to the same question would be no mismatch. It depends on the order of the data alone, so
log-probabilities under the bare base can be computed once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np

from lowrank.data.batching.dataloader import Sample
from lowrank.segments import MISMATCHED, Segment

_LOOK_BACK = 64


def with_mismatched(samples: Iterable[Sample], max_length: int) -> Iterator[Sample]:
    """The samples of rated answers, each followed by a MISMATCHED segment of at most `max_length` tokens.

    Where all prompts are the same, the answer is any other row's; a single row keeps its own.
    """
    before: deque[Segment] = deque(maxlen=_LOOK_BACK)
    waiting: list[Segment] = []
    for (segment,) in samples:
        other = _other(segment, before)
        if other is None and len(before) < _LOOK_BACK:
            waiting.append(segment)
        else:
            for each in waiting:
                yield _sample(each, segment, max_length)
            waiting.clear()
            yield _sample(segment, other or before[-1], max_length)
        before.append(segment)
    for place, segment in enumerate(waiting):
        yield _sample(segment, waiting[place - 1], max_length)


def _other(segment: Segment, before: deque[Segment]) -> Segment | None:
    return next((each for each in reversed(before) if not _same_prompt(each, segment)), None)


def _same_prompt(one: Segment, other: Segment) -> bool:
    pictures = [each.media and each.media.items for each in (one, other)]
    first_L, second_L = (each.token_L[: _answer_at(each)] for each in (one, other))
    return pictures[0] == pictures[1] and np.array_equal(first_L, second_L)


def _answer_at(segment: Segment) -> int:
    """Where the answer begins: the first token that carries weight."""
    return int(np.flatnonzero(segment.weight_L)[0])


def _sample(segment: Segment, other: Segment, max_length: int) -> Sample:
    at, of_other = _answer_at(segment), _answer_at(other)
    token_L = np.concatenate([segment.token_L[:at], other.token_L[of_other:]])[:max_length]
    weight_L = np.concatenate([segment.weight_L[:at], other.weight_L[of_other:]])[:max_length]
    media = segment.media and segment.media.between(0, at)
    return segment, Segment(token_L, weight_L, role=MISMATCHED, media=media)
