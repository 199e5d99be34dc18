"""Unsloth's three functions around conversations: a template by name, ShareGPT's keys, loss on answers alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lowrank.data import templates
from lowrank.data.config import Config as DataConfig
from lowrank.data.rendering import Renderer
from lowrank.errors import ConfigError, DataError, did_you_mean

IGNORED = -100
NAMES = {
    "llama": "llama2", "llama-2": "llama2", "llama-3": "llama3", "llama-3.1": "llama3", "llama-3.2": "llama3",
    "llama-3.3": "llama3", "phi-3": "phi3", "phi-3.5": "phi3", "gemma2": "gemma", "gemma-2": "gemma",
    "qwen-2.5": "qwen", "qwen2.5": "qwen", "qwen25": "qwen",
}  # fmt: skip
"""Unsloth's names of templates that have another one here."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SAY = logging.getLogger(__name__)


def get_chat_template(
    tokenizer: Any, chat_template: str = "chatml", mapping: Mapping[str, str] | None = None, map_eos_token: bool = True
) -> Any:
    """The tokenizer, which from now on writes conversations by a built-in template (or a .jinja file).

    `map_eos_token`: EOS becomes what ends a turn in it. ConfigError, ModelError: no such template, or the tokenizer
    lacks its tokens. `mapping` of other keys than role and content is refused: `standardize_sharegpt` renames them.
    """
    if mapping and any(key != value for key, value in mapping.items()):
        raise ConfigError("mapping: rename the keys of the data instead, with standardize_sharegpt(dataset)")
    name = NAMES.get(chat_template, chat_template)
    tokenizer.chat_template = templates.choose(tokenizer, name)
    if map_eos_token:
        stops = Renderer(tokenizer, DataConfig()).stop_tokens - {tokenizer.eos_token_id}
        if len(stops) == 1:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next(iter(stops)))
    return tokenizer


def standardize_sharegpt(dataset: Any, column: str = "conversations") -> Any:
    """Turns of `{"from", "value"}` as `{"role", "content"}`; those that have them already stay."""

    def turns(row: Mapping[str, Any]) -> dict[str, Any]:
        return {column: [_turn(each) for each in row[column]]}

    return dataset.map(turns, desc="standardize_sharegpt")


def _turn(given: Mapping[str, Any]) -> dict[str, str]:
    role = given.get("role") or given.get("from")
    if role not in _ROLES:
        raise DataError(f"standardize_sharegpt: a turn of {role!r}{did_you_mean(str(role), _ROLES)}")
    content = given.get("content") if given.get("content") is not None else given.get("value")
    if not isinstance(content, str):
        raise DataError("standardize_sharegpt: a turn has neither content nor value")
    return {"role": _ROLES[role], "content": content}


def train_on_responses_only(trainer: Any, instruction_part: str, response_part: str, tokenizer: Any = None) -> Any:
    """The trainer (TRL's SFTTrainer), whose data now carries loss between `response_part` and `instruction_part` alone.

    Rows without an answer are taken out, and counted. DataError if no row has one. ConfigError for packed data.
    """
    if trainer.args.packing:
        raise ConfigError("train_on_responses_only: set packing=False, a packed row is no conversation any more")
    tokenizer = tokenizer or trainer.processing_class
    parts = instruction_part, response_part
    trainer.train_dataset = _masked(trainer.train_dataset, tokenizer, parts, "the training data")
    if isinstance(trainer.eval_dataset, Mapping):
        trainer.eval_dataset = {
            name: _masked(each, tokenizer, parts, name) for name, each in trainer.eval_dataset.items()
        }
    elif trainer.eval_dataset is not None:
        trainer.eval_dataset = _masked(trainer.eval_dataset, tokenizer, parts, "the evaluation data")
    return trainer


def _masked(dataset: Any, tokenizer: Any, parts: tuple[str, str], what: str) -> Any:
    def labels(row: Mapping[str, Any]) -> dict[str, list[int]]:
        learned = _learned(row["input_ids"], tokenizer, parts)
        return {"labels": [token if yes else IGNORED for token, yes in zip(row["input_ids"], learned)]}

    marked = dataset.map(labels, desc="train_on_responses_only")
    kept = marked.filter(lambda row: any(label != IGNORED for label in row["labels"]))
    lost = len(marked) - len(kept)
    if not len(kept):
        raise DataError(f"train_on_responses_only: no row of {what} has {parts[1]!r} with an answer behind it")
    if lost:
        _SAY.warning("train_on_responses_only: %d of %d rows of %s have no answer and are left out", lost, len(marked),
                     what)  # fmt: skip
    return kept


def _learned(token_L: list[int], tokenizer: Any, parts: tuple[str, str]) -> list[bool]:
    """Which tokens lie in an answer. Found in the text, since where parts meet tokens melt together."""
    text = tokenizer.decode(token_L, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if list(again["input_ids"]) != list(token_L):
        raise DataError("train_on_responses_only: a row reads as other tokens than it was made of; it may be cut")
    answers = list(_answers(text, *parts))
    return [
        any(start <= first and last <= end for start, end in answers) and first < last
        for first, last in again["offset_mapping"]
    ]


def _answers(text: str, instruction_part: str, response_part: str) -> Iterator[tuple[int, int]]:
    """The characters from behind each `response_part` to the next `instruction_part`."""
    at = text.find(response_part)
    while at >= 0:
        start = at + len(response_part)
        end = text.find(instruction_part, start)
        yield start, end if end >= 0 else len(text)
        at = text.find(response_part, end) if end >= 0 else -1
