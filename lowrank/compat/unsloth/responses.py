"""Loss on answers alone: which tokens of a written conversation the model says."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lowrank.errors import ConfigError, DataError

IGNORED = -100
_LOG = logging.getLogger(__name__)
_QUESTIONS, _ANSWERS = ("Zq1aw", "Zq2bw"), ("Ya1cx", "Ya2dx")
"""Texts that no template writes by itself."""


def train_on_responses_only(
    trainer: Any,
    instruction_part: str | None = None,
    response_part: str | None = None,
    force_match: bool = True,
    tokenizer: Any = None,
    return_function: bool = False,
    num_proc: int | None = None,
    last_response_only: bool = False,
) -> Any:
    """The trainer (TRL's SFTTrainer), whose data now carries loss between `response_part` and `instruction_part` alone.

    Without parts they are read from the tokenizer's chat template, and said. Rows without an answer are taken out, and
    counted. `last_response_only`: of several answers the last. `return_function`: the function of a batch of rows that
    gives the labels. DataError if no row has an answer. ConfigError for packed data, or one part without the other.
    """
    if trainer is not None and trainer.args.packing:
        raise ConfigError("train_on_responses_only: set packing=False, a packed row is no conversation any more")
    if tokenizer is None:
        assert trainer is not None, "without a trainer a tokenizer has to be given"
        tokenizer = trainer.processing_class
    if not force_match:
        _LOG.warning("train_on_responses_only: force_match=False has no effect: parts are found in the text")
    if (instruction_part is None) != (response_part is None):
        raise ConfigError("train_on_responses_only: give both instruction_part and response_part, or neither")
    if instruction_part is None or response_part is None:
        instruction_part, response_part = parts_of(tokenizer)
        _LOG.warning("train_on_responses_only: the chat template says instruction_part=%r, response_part=%r",
                     instruction_part, response_part)  # fmt: skip
    parts = instruction_part, response_part

    def labels(row: Mapping[str, Any]) -> dict[str, list[int]]:
        learned = _learned(row["input_ids"], tokenizer, parts, last_response_only)
        own = row.get("labels") or row["input_ids"]
        return {"labels": [label if yes else IGNORED for label, yes in zip(own, learned)]}

    if return_function:
        return lambda batch: {"labels": [labels({"input_ids": list(each)})["labels"] for each in batch["input_ids"]]}
    assert trainer is not None
    trainer.train_dataset = _masked(trainer.train_dataset, labels, parts, "the training data", num_proc)
    if isinstance(trainer.eval_dataset, Mapping):
        trainer.eval_dataset = {
            name: _masked(each, labels, parts, name, num_proc) for name, each in trainer.eval_dataset.items()
        }
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = _masked(trainer.eval_dataset, labels, parts, "the evaluation data", num_proc)
    return trainer


def parts_of(tokenizer: Any) -> tuple[str, str]:
    """(what stands before a question, what before an answer) in the tokenizer's chat template.

    ConfigError where they cannot be told apart, or there is no template.
    """
    turns = [{"role": role, "content": text} for pair in zip(_QUESTIONS, _ANSWERS)
             for role, text in zip(("user", "assistant"), pair)]  # fmt: skip
    try:
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        question = tokenizer.apply_chat_template(turns[:1], tokenize=False)
    except Exception as error:  # templates are programs, and fail as they like
        raise ConfigError("train_on_responses_only: the chat template writes no plain conversation; give "
                          f"instruction_part and response_part ({error})") from error  # fmt: skip
    places = [whole.find(text) for text in (_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1], _ANSWERS[1])]
    if -1 in places or _QUESTIONS[0] not in question:
        raise ConfigError("train_on_responses_only: the chat template changes what is said; give instruction_part "
                          "and response_part")  # fmt: skip
    width = len(_QUESTIONS[0])
    to_answer = whole[places[0] + width : places[1]]
    to_question = whole[places[1] + width : places[2]]
    end_of_question = question[question.find(_QUESTIONS[0]) + width :]
    end_of_answer = whole[places[3] + width :]
    response = _without(to_answer, end_of_question)
    instruction = _without(to_question, end_of_answer)
    if not instruction.strip() or not response.strip():
        raise ConfigError("train_on_responses_only: the chat template marks no turns; give instruction_part and "
                          "response_part")  # fmt: skip
    return instruction, response


def _without(between: str, end: str) -> str:
    """What begins the next turn: `between` without the end of the last one, unless nothing would be left."""
    for each in (end, end.rstrip()):
        if each and between.startswith(each) and between.removeprefix(each).strip():
            return between.removeprefix(each).lstrip("\n")
    return between.lstrip("\n")


def _masked(dataset: Any, labels: Callable[..., Any], parts: tuple[str, str], what: str, num_proc: int | None) -> Any:
    num_proc = num_proc if num_proc and num_proc > 1 else None
    marked = dataset.map(labels, desc="train_on_responses_only", num_proc=num_proc)
    kept = marked.filter(lambda row: any(label != IGNORED for label in row["labels"]), num_proc=num_proc)
    lost = len(marked) - len(kept)
    if not len(kept):
        raise DataError(f"train_on_responses_only: no row of {what} has {parts[1]!r} with an answer behind it")
    if lost:
        _LOG.warning("train_on_responses_only: %d of %d rows of %s have no answer and are left out", lost, len(marked),
                     what)  # fmt: skip
    return kept


def _learned(token_L: list[int], tokenizer: Any, parts: tuple[str, str], last_only: bool) -> list[bool]:
    """Which tokens lie in an answer. Found in the text, since where parts meet tokens melt together."""
    text = tokenizer.decode(token_L, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) == list(token_L):
        places = list(again["offset_mapping"])
    else:  # it was cut, or made in pieces: its own text, token by token
        text, places = _places(token_L, tokenizer)
    answers = list(_answers(text, *parts))
    answers = answers[-1:] if last_only else answers
    return [any(start <= first and last <= end for start, end in answers) and first < last for first, last in places]


def _places(token_L: list[int], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """The text and the characters of each token, as far as decoding longer and longer beginnings tells."""
    ends = [
        len(tokenizer.decode(token_L[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        for count in range(len(token_L) + 1)
    ]
    text = tokenizer.decode(token_L, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text, [(min(first, last), max(first, last)) for first, last in itertools.pairwise(ends)]


def _answers(text: str, instruction_part: str, response_part: str) -> Iterator[tuple[int, int]]:
    """The characters from behind each `response_part` to the next `instruction_part`."""
    at = text.find(response_part)
    while at >= 0:
        start = at + len(response_part)
        end = text.find(instruction_part, start)
        yield start, end if end >= 0 else len(text)
        at = text.find(response_part, end) if end >= 0 else -1
