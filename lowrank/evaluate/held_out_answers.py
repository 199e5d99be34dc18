"""While a job trains: its adapter answers held-out questions, and a metric says how near it comes.

The questions are made from the held-out segments themselves: what stands before the last learned answer is the prompt,
token for token as in training, and that answer is the label. Answers are greedy, so nothing random is touched.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.errors import DataError
from lowrank.evaluate.metrics import measure
from lowrank.generate.generation import Generation
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt
from lowrank.models.base import Base
from lowrank.records import KIND_NAMES, Picture
from lowrank.segments import CHOSEN, PLAIN, Media, Segment

_MAX_ROWS = 32
"""Answers in progress at once: training has filled the memory already."""


@dataclass(frozen=True)
class HeldOutAnswers:
    """What one job is asked at its evaluations, and by what the answers are judged.

    prompts, labels   the questions, tokens and the pictures in them; the answers in the data
    notices           what of the held-out rows is not asked, in words
    """

    metric: str
    prompts: tuple[tuple[np.ndarray, Media | None], ...]
    labels: tuple[str, ...]
    stop_tokens: frozenset[int]
    max_new_tokens: int
    notices: tuple[str, ...] = ()


def answers_of(
    segments: Sequence[Segment],
    tokenizer: Any,
    stop_tokens: frozenset[int],
    *,
    metric: str,
    samples: int | None,
    max_new_tokens: int,
    reach: int | None,
    image_problem: str | None = None,
) -> HeldOutAnswers:
    """Questions from `samples` of the held-out `segments`, evenly spread over them; None: from all.

    Of pairs and rated answers those that are wanted. Left out, and counted, are answers that were cut at
    data.max_length, prompts that leave the model (`reach`: its positions) no room, and those with media that it is not
    asked about (`image_problem`: why it is not about pictures). DataError if none is left.
    """
    wanted = [segment for segment in segments if segment.role in (PLAIN, CHOSEN)]
    questions, cut, too_long, unseen = [], 0, 0, Counter[str]()
    for segment in _sample_evenly(wanted, samples):
        start, end = _last_answer(segment)
        if int(segment.token_L[end - 1]) not in stop_tokens:
            cut += 1
        elif reach is not None and start >= reach:
            too_long += 1
        elif reason := _why_unseen(segment.media, image_problem):
            unseen[reason] += 1
        else:
            media = segment.media and segment.media.between(0, start)
            label = tokenizer.decode(segment.token_L[start:end], skip_special_tokens=True)
            questions.append(((segment.token_L[:start], media), label))
    notices = []
    if cut:
        notices.append(f"{metric}: {cut} held-out answers are not asked for, since they were cut at data.max_length")
    if too_long:
        notices.append(
            f"{metric}: {too_long} held-out questions are not asked, since they are all that the model reads"
        )
    notices += [f"{metric}: {number} held-out questions are not asked: {reason}" for reason, number in unseen.items()]
    if not questions:
        raise DataError("; ".join([f"eval_metric: no held-out row has an answer to compare with {metric}", *notices]))
    if len(wanted) > len(questions) + cut + too_long + unseen.total():
        notices.append(f"{metric} is of {len(questions)} of {len(wanted)} held-out answers (eval_generate_samples)")
    prompts, labels = zip(*questions)
    return HeldOutAnswers(metric, prompts, labels, stop_tokens, max_new_tokens, tuple(notices))


@dataclass(frozen=True)
class Scored:
    """How one job answered. `metrics`: percentages, higher is better; beside the metric `answers_cut`, how many answers
    ended at `max_new_tokens`, where there are any. `rows`: what each answer adds to the metric (`Metric.per_row`)."""

    metrics: dict[str, float]
    rows: tuple[float, ...] = ()


def score_answers(base: Base, bank: Bank, held_out: Mapping[int, HeldOutAnswers]) -> dict[int, Scored]:
    """By slot, all slots in the same forward passes. One that gives NaN has NaN: whoever cannot answer is not the
    best."""
    longest = max(
        (len(token_L) + each.max_new_tokens for each in held_out.values() for token_L, _ in each.prompts), default=0
    )
    rows = min(_MAX_ROWS, sum(len(each.prompts) for each in held_out.values()))
    generator = Generator(
        base, bank, GeneratorConfig(max_num_seqs=max(1, rows), kv_cache_tokens=(rows + 1) * (longest + 256))
    )
    generations = {slot: list(_submit(generator, slot, each)) for slot, each in held_out.items()}
    while generator.step():
        pass
    found = {}
    for slot, each in held_out.items():
        answers = [generation.answer for generation in generations[slot]]
        if any(answer.error is not None for answer in answers):
            found[slot] = Scored({each.metric: math.nan})
            continue
        generated = [base.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
        measured = measure(generated, each.labels, [each.metric])[each.metric]
        cut = sum(answer.finish == "length" for answer in answers)
        metrics = {each.metric: measured.value, **({"answers_cut": float(cut)} if cut else {})}
        found[slot] = Scored(metrics, tuple(measured.per_row().tolist()))
    return found


def _submit(generator: Generator, slot: int, held_out: HeldOutAnswers) -> Iterator[Generation]:
    config = GenerationConfig(max_new_tokens=held_out.max_new_tokens, seed=0)
    for token_L, media in held_out.prompts:
        yield generator.submit(Prompt(token_L, slot, media), config, stop_tokens=held_out.stop_tokens)


def _why_unseen(media: Media | None, image_problem: str | None) -> str | None:
    """Why nobody is asked about these media while training; None: nothing stands against it."""
    if media is None:
        return None
    other = next((KIND_NAMES[each.kind] for each in media.items if not isinstance(each, Picture)), None)
    return image_problem if other is None else f"lowrank trains on {other} but does not generate from them yet"


def _sample_evenly(segments: Sequence[Segment], number: int | None) -> list[Segment]:
    """Evenly over the rows: a file may be sorted."""
    if number is None or number >= len(segments):
        return list(segments)
    return [segments[place * len(segments) // number] for place in range(number)]


def _last_answer(segment: Segment) -> tuple[int, int]:
    """Where the last run of learned tokens begins and ends."""
    learned_L = segment.weight_L > 0
    end = int(np.flatnonzero(learned_L)[-1]) + 1
    before = np.flatnonzero(~learned_L[:end])
    return (int(before[-1]) + 1 if len(before) else 0), end
