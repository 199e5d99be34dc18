"""Settings of the data room."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, field_validator

from lowrank.settings import Fraction, NonNegative, Positive, Settings


class SourceConfig(Settings):
    """One dataset: where its rows are and how a row becomes a record."""

    path: str
    """A file (json, jsonl, csv, parquet, arrow, txt), a folder of such files, `lowrank/demo`, `lowrank/demo-heldout`,
    or a hub name."""
    format: str | None = None
    """alpaca, sharegpt, messages, text, prompt_completion, or your own `my_module:my_function`. Left out: recognised
    from the first rows."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column plays which part, e.g. {prompt: question, response: answer}; names as in dataset_info.json."""
    tags: dict[str, str] = Field(default_factory=dict)
    """For chat formats: role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag, system_tag."""
    max_samples: Positive | None = None
    """Use at most this many rows of this dataset, chosen by the seed."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this dataset under `mix: interleave`."""
    split: str = "train"
    """Split of a hub dataset."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Text to put for placeholders, e.g. {"{{name}}": Ada}."""


class Config(Settings):
    """What a job learns from."""

    train: tuple[SourceConfig, ...] = ()
    """Datasets to train on; a plain path stands for {path: ...}."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out datasets."""
    validation_split: Fraction = 0.0
    """Without `eval`: this share of the training rows is held out, chosen by the seed."""
    max_samples: Positive | None = None
    """Use at most this many rows of each dataset."""
    mix: Literal["concat", "interleave"] = "concat"
    """Several datasets: all their rows, or rows drawn by `weight` until the first dataset is used up."""
    streaming: bool = False
    """Read rows as they are needed, for files larger than memory. Needs `max_steps`."""
    max_length: Positive = 2048
    """Tokens of one sample at the most."""
    on_too_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """A longer sample is cut at the end of its answer (the prompt is kept), left out, cut in pieces, or refused."""
    batch_size: Positive = 16
    """Samples per optimiser step (cut into forward passes by `micro_batch_tokens`; that never changes the result)."""
    batch_tokens: Positive | None = None
    """Instead of `batch_size`: fill each optimiser step with up to this many tokens, best fit."""
    shuffle: bool = True
    """A new order every epoch, drawn from the seed."""
    chat_template: str | None = None
    """A built-in template (chatml, llama3, alpaca, ...) or a .jinja file, instead of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    chat_template_date: date | None = None
    """What templates that write today's date (Llama 3) take for today. Left out: the day the run began, also when it
    goes on on another day."""
    default_system: str | None = None
    """System prompt for conversations that have none; a system prompt that is there is never altered."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answers."""
    mask_history: bool = False
    """Learn only the last answer of a conversation."""
    strict: bool = False
    """Any loss of data (a row dropped or truncated) is an error."""
    num_samples_shown: NonNegative = 2
    """Rendered samples the doctor shows, coloured by what carries loss."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value
