"""Rows as Unsloth's trainers read them, where TRL reads the same columns in another way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

_LOG = logging.getLogger(__name__)
_TOKENS = ("input_ids", "labels")
_PARTS = ("prompt", "completion")


def prepare(dataset: Any, field: str, tokenizer: Any, formatting: Callable[..., Any] | None = None) -> Any:
    """A dataset for SFTTrainer whose texts are in the column `field`, alone, without a BOS that is added anyway.

    Where there is that column, Unsloth reads it, while TRL would prefer conversations beside it. `formatting` may give
    a list of texts for a batch of rows, as Unsloth wants it. Rows that are tokenized, or prompts with completions, stay
    as they are.
    """
    if type(dataset) is dict:
        return {name: prepare(each, field, tokenizer, formatting) for name, each in dataset.items()}
    return _texts(dataset, field, tokenizer, formatting) if hasattr(dataset, "map") else dataset


def as_dataset(rows: Any) -> Any:
    """A list of rows, as vision notebooks give it, as the `Dataset` that TRL wants; the objects in it (pictures) stay
    what they are, and are handed out when they are asked for."""
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], Mapping):
        return rows
    from datasets import Dataset

    names = list(rows[0])

    def taken(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        return {name: [rows[place].get(name) for place in batch["place"]] for name in names}

    return Dataset.from_dict({"place": list(range(len(rows)))}).with_transform(taken)


def _texts(dataset: Any, field: str, tokenizer: Any, formatting: Callable[..., Any] | None) -> Any:
    first = next(iter(dataset), None)
    if first is None or any(name in first for name in _TOKENS) or all(name in first for name in _PARTS):
        return dataset
    columns = list(first)
    if field not in columns and formatting is not None and not _is_of_a_row(formatting, first):
        dataset = dataset.map(
            lambda batch: {field: formatting(batch)}, batched=True, remove_columns=[c for c in columns if c != field]
        )
        first = next(iter(dataset))
    elif field in columns and columns != [field]:
        dataset = dataset.select_columns([field])
    text = first.get(field)
    if isinstance(text, str) and _adds_bos(tokenizer) and text.startswith(tokenizer.bos_token):
        _LOG.warning("the texts begin with BOS (%r), and the tokenizer adds one: it is taken out of the texts",
                     tokenizer.bos_token)  # fmt: skip
        bos = tokenizer.bos_token
        dataset = dataset.map(lambda row: {field: row[field].removeprefix(bos)})
    return dataset


def _is_of_a_row(formatting: Callable[..., Any], row: Mapping[str, Any]) -> bool:
    """A function of one row, which TRL calls itself; one of a batch fails on a row, or gives a list."""
    try:
        return isinstance(formatting(row), str)
    except Exception:  # a person's own function, which may be made for a batch
        return False


def _adds_bos(tokenizer: Any) -> bool:
    if getattr(tokenizer, "bos_token", None) is None:
        return False
    return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def shorten_prompts(trainer: Any, limit: int) -> None:
    """Keep the last `limit` tokens of each prompt, as trainers of older releases did with `max_prompt_length`."""
    if hasattr(trainer, "_tokenize_prompts"):  # prompts that are answered in training
        own = trainer._tokenize_prompts

        def shortened(prompts: list[Any]) -> Any:
            token_BL, *others = own(prompts)
            return ([row[-limit:] for row in token_BL], *others)

        trainer._tokenize_prompts = shortened
        return
    for name in ("train_dataset", "eval_dataset"):
        dataset = getattr(trainer, name, None)
        columns = getattr(dataset, "column_names", None) or ()
        if dataset is not None and "prompt_ids" in columns:
            setattr(trainer, name, dataset.map(lambda row: {"prompt_ids": row["prompt_ids"][-limit:]}))
        elif dataset is not None and "prompt_input_ids" in columns:
            setattr(trainer, name, dataset.map(lambda row: _without_beginning(row, limit)))
        elif dataset is not None:
            _LOG.warning("max_prompt_length=%d: %s keeps no prompts apart, so max_length alone cuts", limit, name)


def _without_beginning(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A row of ORPO's, whose answers repeat the prompt before them, each with a mask and labels as long."""
    spare = max(0, len(row["prompt_input_ids"]) - limit)
    parts = ("prompt_", "chosen_", "rejected_")
    return {key: each[spare:] for key, each in row.items() if key.startswith(parts) and isinstance(each, list)
            and all(isinstance(token, int) for token in each)}  # fmt: skip
