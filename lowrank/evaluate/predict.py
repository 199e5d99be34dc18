"""Has all adapters answer all questions in one pass; every answer is written to disk as soon as it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.checkpoints.atomic import new_file
from lowrank.data.chat.rendered_record import Rendering
from lowrank.data.chat.rendering import Renderer
from lowrank.errors import DataError
from lowrank.evaluate.bootstrap import Interval, difference, interval
from lowrank.evaluate.likelihood import label_logprobs, perplexity
from lowrank.evaluate.metrics import Metric, measure
from lowrank.evaluate.questions import Question
from lowrank.foreign_files import find_object
from lowrank.generate.answer_text import answer_text_of
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import GenerationConfig, Prompt, RequestError, TokenChunk
from lowrank.models.base import Base
from lowrank.records import COLUMN_NAMES, Message
from lowrank.segments import Segment

Done = Callable[[int, int], None]
"""`(done, of how many)`."""
_AHEAD = 4
"""Questions that wait in the generator, for each it works on."""


@dataclass(frozen=True)
class ModelAnswer:
    """A model's answer to a question; where there is none, `problem` says why, and it counts in no metric."""

    text: str
    problem: str | None = None


@dataclass(frozen=True)
class AnsweringModels:
    """Who answers: names and their slots, on one base, each with the way it reads a conversation."""

    base: Base
    bank: Bank
    slots: Mapping[str, int]
    renderers: Mapping[str, Renderer]
    compiled: CompiledDecoding | None = None
    """The base's compiled layers, where they answer through them."""


def answer_questions(
    answering_models: AnsweringModels,
    questions: Sequence[Question],
    config: GenerationConfig,
    partial: Path,
    *,
    max_rows: int = 64,
    on_done: Done = lambda done, total: None,
) -> list[dict[str, ModelAnswer]]:
    """`{model: answer}` of each question. Lines of `partial` are answers of an earlier attempt; new ones are added.

    An answer that cannot be had (a question beyond the model's reach or that the chat template refuses, an adapter that
    gives NaN) has a `problem`.
    """
    found = _read_partial(partial, questions)
    todo = [
        (index, name) for index in range(len(questions)) for name in answering_models.slots if name not in found[index]
    ]
    total = len(questions) * len(answering_models.slots)
    done = total - len(todo)
    on_done(done, total)
    longest = (answering_models.base.max_positions or 4096) if todo else 1
    settings = GeneratorConfig(
        max_num_seqs=max_rows, kv_cache_tokens=max(16384, min(max_rows * 2048, max_rows * longest))
    )
    generator = Generator(answering_models.base, answering_models.bank, settings, answering_models.compiled)
    prompts: dict[tuple[int, Renderer], Segment] = {}
    with open(partial, "a", encoding="utf-8") as file:
        file.write("\n")  # the last line of an attempt that was killed may have no end

        def note(index: int, name: str, generated: ModelAnswer) -> None:
            nonlocal done
            found[index][name] = generated
            line = {
                "digest": _key_of_question(questions[index]),
                "voice": name,
                "answer": generated.text,
                "problem": generated.problem,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done += 1
            on_done(done, total)

        for index, name in todo:
            try:
                renderer = answering_models.renderers[name]
                if (index, renderer) not in prompts:
                    prompts = {key: value for key, value in prompts.items() if key[0] == index}
                    prompts[index, renderer] = renderer.prompt_segment(questions[index].prompt)
                rendered = prompts[index, renderer]
                prompt = Prompt(rendered.token_L, answering_models.slots[name], rendered.media)
                generation = generator.submit(prompt, config, stop_tokens=renderer.stop_tokens)
            except (RequestError, DataError) as error:
                note(index, name, ModelAnswer("", str(error)))
                continue

            def on_chunk(chunk: TokenChunk, index: int = index, name: str = name, generation: Any = generation) -> None:
                if chunk.finish is not None:
                    answer = generation.answer
                    text = answer_text_of(answering_models.renderers[name], answer.tokens)
                    note(index, name, ModelAnswer(text, answer.error))

            generation.listen(on_chunk)
            while generator.num_waiting > _AHEAD * max_rows:
                generator.step()
        while generator.step():
            pass
    return [{name: answers[name] for name in answering_models.slots} for answers in found]


def score_labels(
    answering_models: AnsweringModels, questions: Sequence[Question], *, on_done: Done = lambda done, total: None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """`{model: (N, 2)}` of log-probabilities of the answers in the data (likelihood.py); and why some were not scored.

    The line of a question that was not scored is 0.
    """
    entries, places, unscored = [], [], {}
    for renderer in dict.fromkeys(answering_models.renderers[name] for name in answering_models.slots):
        names = [name for name in answering_models.slots if answering_models.renderers[name] is renderer]
        known = [
            each
            for name in names
            if (each := answering_models.bank.max_positions(answering_models.slots[name])) is not None
        ]
        for index, each in enumerate(_labels(renderer, questions, min(known, default=None))):
            if not each.segments:
                unscored[index] = each.problem or "nothing to score"
                continue
            for name in names:
                entries.append((answering_models.slots[name], each.segments[0]))
                places.append((name, index))
    values_N2 = label_logprobs(
        answering_models.base,
        answering_models.bank,
        entries,
        on_done=lambda done: on_done(done, len(entries)),
        on_broken=lambda place, error: unscored.update({places[place][1]: str(error)}),
    )
    found = {name: np.zeros((len(questions), 2)) for name in answering_models.slots}
    for (name, index), value_2 in zip(places, values_N2):
        found[name][index] = value_2
    return found, list(unscored.values())


def _labels(renderer: Renderer, questions: Sequence[Question], reach: int | None) -> Iterator[Rendering]:
    """Questions with the answers of the data, of which the last alone is scored."""
    settings = renderer.config.model_copy(
        update={
            "mask_history": True,
            "train_on_prompt": False,
            "on_too_long": "drop",
            "max_length": reach or 1 << 30,
        }
    )
    return Renderer(renderer.tokenizer, settings).render_many([question.answered for question in questions])


@dataclass(frozen=True)
class Unanswered:
    """Questions to which some models gave no answer, all of them the same questions."""

    model_names: tuple[str, ...]
    places: tuple[int, ...]
    reasons: tuple[str, ...]
    """Different ones, in the order they came."""

    def describe(self, total: int) -> str:
        """In one sentence; `total` is the number of all questions."""
        reasons = "; ".join(self.reasons[:3]) + (f"; and {len(self.reasons) - 3} more" * (len(self.reasons) > 3))
        return (
            f"{', '.join(self.model_names)}: no answer to {len(self.places)} of {total} questions ({reasons}); "
            f"metrics are of the other {total - len(self.places)}"
        )


def unanswered(answers: Sequence[Mapping[str, ModelAnswer]]) -> list[Unanswered]:
    """What is missing, models that miss the same questions together."""
    missing: dict[tuple[int, ...], list[str]] = {}
    for model_name in answers[0]:
        places = tuple(place for place, each in enumerate(answers) if each[model_name].problem is not None)
        if places:
            missing.setdefault(places, []).append(model_name)
    return [
        Unanswered(
            tuple(names),
            places,
            tuple(dict.fromkeys(answers[place][name].problem or "" for place in places for name in names)),
        )
        for places, names in missing.items()
    ]


def write_predictions(path: Path, questions: Sequence[Question], answers: Sequence[Mapping[str, ModelAnswer]]) -> None:
    """A line per question: the prompt, the label, what each model said, and why one said nothing."""
    with new_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers):
            messages = [_written(each) for each in question.prompt.messages]
            line: dict[str, Any] = {"place": question.place, "prompt": messages, "label": question.label.content}
            line["predictions"] = {
                name: generated.text if generated.problem is None else None for name, generated in answer.items()
            }
            problems = {name: generated.problem for name, generated in answer.items() if generated.problem is not None}
            line |= {"problems": problems} if problems else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _written(message: Message) -> dict[str, Any]:
    shown: dict[str, list[str]] = {}
    for _, medium in message.media:
        shown.setdefault(COLUMN_NAMES[medium.kind], []).append(medium.name)
    return {"role": message.role, "content": message.content, **shown}


@dataclass(frozen=True)
class MetricResult:
    """One model's metric, and how far it is from the bare base's (None for the base itself)."""

    value: Interval
    gain: Interval | None
    """Over the rows that both have."""
    rows: int
    """How many the value is of."""
    signature: str = ""


def compare(
    answers: Sequence[Mapping[str, ModelAnswer]],
    labels: Sequence[str],
    names: Sequence[str],
    likelihood: Mapping[str, np.ndarray],
    reference: str | None,
) -> dict[str, dict[str, MetricResult]]:
    """`{model: {metric: result}}`; `reference` is the model that the others are compared with.

    A row that a model has no answer to counts in none of its metrics; nor in its perplexity a row whose log-probability
    is not finite. A metric without any row is not there.
    """
    measured: dict[str, dict[str, tuple[Metric, np.ndarray]]] = {}
    for model_name in answers[0]:
        known_N = np.asarray([each[model_name].problem is None for each in answers])
        found = measure([each[model_name].text for each in answers], labels, names)
        measured[model_name] = {name: (metric, known_N) for name, metric in found.items()}
        if model_name in likelihood:
            scored_N = np.isfinite(likelihood[model_name]).all(1) & (likelihood[model_name][:, 1] > 0)
            measured[model_name]["perplexity"] = perplexity(likelihood[model_name]), scored_N
    metric_results: dict[str, dict[str, MetricResult]] = {}
    for model_name, own in measured.items():
        other = measured.get(reference or "", {}) if model_name != reference else {}
        metric_results[model_name] = {
            name: _metric_result(metric, known_N, other.get(name))
            for name, (metric, known_N) in own.items()
            if known_N.any()
        }
    return metric_results


def _metric_result(metric: Metric, known_N: np.ndarray, other: tuple[Metric, np.ndarray] | None) -> MetricResult:
    gain = None
    if other is not None and (both_N := known_N & other[1]).any():
        gain = difference(metric.of(both_N), other[0].of(both_N))
    return MetricResult(interval(metric.of(known_N)), gain, int(known_N.sum()), metric.signature)


def _key_of_question(question: Question) -> str:
    content = repr((question.prompt, question.label.content)).encode("utf-8", "replace")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _read_partial(partial: Path, questions: Sequence[Question]) -> list[dict[str, ModelAnswer]]:
    """Answers of an attempt that was interrupted; a line that was cut off is left out."""
    known: dict[str, dict[str, ModelAnswer]] = {}
    if partial.exists():
        # not splitlines: U+2028 and its kin may stand in an answer
        for line in partial.read_text(encoding="utf-8", errors="replace").split("\n"):
            entry = find_object(line) or {}
            try:
                if entry["problem"] is None:  # what stood in the way may be mended, as a file that was broken
                    known.setdefault(entry["digest"], {})[entry["voice"]] = ModelAnswer(entry["answer"])
            except (KeyError, TypeError):
                continue
    return [dict(known.get(_key_of_question(question), {})) for question in questions]
