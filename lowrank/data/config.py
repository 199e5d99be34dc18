"""Settings of the data room."""

from __future__ import annotations

import ast
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from lowrank.settings import Fraction, NonNegative, Positive, Settings


def format_names() -> tuple[str, ...]:
    """The formats of data/formats/built_in.py, from its text: to import it takes torch along, and help is to come at
    once."""
    tree = ast.parse((Path(__file__).parent / "formats" / "built_in.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return tuple(node.name for node in functions if [each.arg for each in node.args.args] == ["row", "columns", "tags"])


_ABOUT_FORMATS = (
    f"{', '.join(format_names())}, or your own `my_module:my_function`. Left out: recognized from the first rows."
)


class SourceConfig(Settings):
    """One dataset: where its rows are and how a row becomes a record."""

    path: str
    """A file (json, jsonl, csv, parquet, arrow, txt, also compressed), a folder of such files, a pattern
    (`data/*.jsonl`), `-` for standard input, `lowrank/demo`, `lowrank/demo-heldout`, or a hub name."""
    format: str | None = Field(default=None, description=_ABOUT_FORMATS)
    columns: dict[str, str] = Field(default_factory=dict)
    """Which column plays which part, e.g. {prompt: question, response: answer}; names as in dataset_info.json."""
    tags: dict[str, str] = Field(default_factory=dict)
    """For chat formats: role_tag, content_tag, user_tag, assistant_tag, observation_tag, function_tag, system_tag."""
    ignored_columns: tuple[str, ...] = ()
    """Columns that are known to be of no use here, so that nothing is said of them and `strict` lets them pass; keys of
    turns are written as the doctor names them, e.g. `messages[].id`."""
    unread_keys: tuple[str, ...] = ()
    """Keys of its entry in LLaMA-Factory's dataset_info.json that mean nothing here: the doctor names them, and
    `strict` refuses them."""
    media_dir: str | None = None
    """The folder of the media that its rows name. Left out: the folder of the data's file. Rows reach no file outside
    of it."""
    fetch_media: bool = False
    """Fetch media that its rows name by URL: by http and https, from public addresses alone, each once, into the cache
    folder (LOWRANK_CACHE). Left out: such rows are left out."""
    max_samples: Positive | None = None
    """Use at most this many rows of this dataset, chosen by the seed."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this dataset under `mix: interleave`."""
    split: str = "train"
    """Split of a hub dataset or of a folder, by its card (README.md) or the names of its files; `all` is every file.
    `train[:100]` and `train[10%:20%]` are rows of it, in order."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset; in a folder, what its card calls so, or a folder of that name."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Text to put for placeholders, e.g. {"{{name}}": Ada}."""
    _held: Any = PrivateAttr(default=None)
    """Rows in memory, which live as long as the settings that name them (data/sources/memory.py)."""
    _format_function: Any = PrivateAttr(default=None)
    """The function that `format` names, where `lowrank.rows` was given it and not its name."""

    @property
    def media_folder(self) -> Path | None:
        """`media_dir`, where it is set."""
        return Path(self.media_dir).expanduser() if self.media_dir is not None else None


class DataConfig(Settings):
    """What a job learns from."""

    train: tuple[SourceConfig, ...] = ()
    """Datasets to train on; a plain path stands for {path: ...}."""
    eval: tuple[SourceConfig, ...] = ()
    """Held-out datasets."""
    validation_split: Fraction | Positive = 0.0
    """Without `eval`: this share of the training rows, or from 1 on so many of them, is held out, chosen by the
    seed."""
    max_samples: Positive | None = None
    """Use at most this many rows of each dataset."""
    mix: Literal["concat", "interleave", "interleave_over", "interleave_once"] = "concat"
    """Several datasets: all their rows, or rows drawn by `weight`. interleave: until the first dataset is used up.
    interleave_over: until all are, those used up earlier beginning again. interleave_once: each row once."""
    streaming: bool = False
    """Read rows as they are needed, for files larger than memory. Needs `max_steps`."""
    tokenized_path: str | None = None
    """A folder in which the tokenized rows are kept: written by the first run, read by later ones instead of the
    datasets. As LLaMA-Factory's, in the layout of `datasets`."""
    max_length: Positive = 2048
    """Tokens of one sample at the most."""
    on_too_long: Literal["truncate", "drop", "split", "error"] = "truncate"
    """A longer sample is cut at the end of its answer (the prompt is kept), left out, cut in pieces, or refused."""
    batch_size: Positive = 16
    """Samples per optimizer step (cut into forward passes by `micro_batch_tokens`; that never changes the result)."""
    batch_tokens: Positive | None = None
    """Instead of `batch_size`: fill each optimizer step with up to this many tokens, best fit."""
    shuffle: bool = True
    """A new order every epoch, drawn from the seed."""
    chat_template: str | None = None
    """A built-in template (chatml, llama3, alpaca, ...) or a .jinja file, instead of the tokenizer's own."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to the chat template, e.g. {enable_thinking: false}."""
    chat_template_date: date | None = None
    """What templates that write today's date (Llama 3) take for today. Left out: the day the run began, also when it
    goes on on another day."""
    split_special_tokens: bool | None = None
    """Whether text that spells a special token (a user's `<|im_end|>`) is read as text, so that nobody's words end a
    turn. Left out: in conversations, tool results and schemas, while plain-text rows may hold such tokens; true: in
    plain text as well; false: everywhere it becomes the token."""
    default_system: str | None = None
    """System prompt for conversations that have none; a system prompt that is there is never altered."""
    train_on_prompt: bool = False
    """Learn the prompt as well as the answers."""
    mask_history: bool = False
    """Learn only the last answer of a conversation."""
    strict: bool = False
    """Any loss of data is an error: a row dropped or truncated, a column or key of a turn that nobody reads."""
    check_pictures: Literal["header", "decode"] = "header"
    """How closely media are looked at before a model loads: by the beginning and end of their files, or
    decoded as in training, about 80 ms for each million pixels."""
    num_samples_shown: NonNegative = 2
    """Rendered samples the doctor shows, colored by what carries loss."""

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _plain_paths(cls, value: Any) -> Any:
        if isinstance(value, (str, dict)):
            value = [value]
        if isinstance(value, (list, tuple)):
            return tuple({"path": item} if isinstance(item, str) else item for item in value)
        return value

    def within(self, reach: int | None) -> DataConfig:
        """The same with no sample longer than `reach` tokens; None: nothing limits it."""
        if reach is None or self.max_length <= reach:
            return self
        return self.model_copy(update={"max_length": reach})
