"""UnslothVisionDataCollator: conversations with pictures as batches for TRL's SFTTrainer.

A row is `{"messages": [...]}` (or `prompt` and `completion`) whose contents are parts: `{"type": "text", "text"}` and
`{"type": "image", "image"}`, the latter a picture of Pillow's, a path, bytes, or base64; nothing is ever fetched. All
tokens carry loss but padding and what stands for pictures, as in Unsloth; `train_on_responses_only` leaves answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from lowrank.compat.unsloth.arguments import warn_once
from lowrank.compat.unsloth.responses import train_on_responses_only as answers_alone
from lowrank.data.formats.columns import RowProblem
from lowrank.data.formats.inline_media import PICTURE_PARTS, part_of
from lowrank.data.formats.media_files import Folders, picture_of
from lowrank.errors import ConfigError, DataError
from lowrank.media.decoding import decoded

IGNORED = -100
_WIDTH = 512
"""Unsloth's, of models whose configuration names no size of pictures."""


class UnslothVisionDataCollator:
    """What a trainer's `data_collator` is. Arguments and defaults are Unsloth's; ConfigError for what is not here."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_seq_length: int | None = None,
        formatting_func: Callable[[Any], Any] | None = None,
        resize: Literal["min", "max"] | int | tuple[int, int] = "min",
        ignore_index: int = IGNORED,
        train_on_responses_only: bool = False,
        instruction_part: str | None = None,
        response_part: str | None = None,
        force_match: bool = True,
        num_proc: int | None = None,
        completion_only_loss: bool = True,
        pad_to_multiple_of: int | None = None,
        resize_dimension: Literal[0, 1, "max", "min"] = 0,
        snap_to_patch_size: bool = False,
        last_response_only: bool = False,
    ) -> None:
        """`resize`: "min" makes pictures no larger than the model's own size (or 512) in `resize_dimension` (0: width,
        1: height, "max", "min"), "max" leaves them, a number or (width, height) is a limit of one's own."""
        if not hasattr(processor, "image_processor"):
            raise ConfigError("UnslothVisionDataCollator wants the processor that FastVisionModel.from_pretrained gave")
        if snap_to_patch_size:
            raise ConfigError(
                "snap_to_patch_size: the model's own processor cuts pictures to its patches; leave it out"
            )
        if num_proc not in (None, 1):
            warn_once("UnslothVisionDataCollator: num_proc has no effect: batches are made where they are asked for")
        self.processor, self.formatting_func = processor, formatting_func
        self.max_seq_length = max_seq_length or getattr(model, "max_seq_length", None)
        self.ignore_index, self.pad_to_multiple_of = ignore_index, pad_to_multiple_of
        self.completion_only_loss = completion_only_loss
        self._limit, self._dimension = _limit(resize, model), resize_dimension
        tokenizer = processor.tokenizer
        never = [getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio")]
        never += [tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None]
        self._unlearned = {int(token) for token in never if token is not None}
        self._answers = None
        if train_on_responses_only:
            self._answers = answers_alone(
                None, instruction_part, response_part, force_match, tokenizer, return_function=True,
                last_response_only=last_response_only,
            )  # fmt: skip

    def __call__(self, examples: Sequence[Any]) -> dict[str, torch.Tensor]:
        """A batch: `input_ids`, `attention_mask`, `labels` (B, L), and the model's tensors of pictures."""
        rows = [self.formatting_func(each) if self.formatting_func else each for each in examples]
        turns = [_turns(row) for row in rows]
        texts = [self._text(each) for each in turns]
        pictures = [self._pictures(each) for each in turns]
        options = {"pad_to_multiple_of": self.pad_to_multiple_of} if self.pad_to_multiple_of else {}
        shown = {"images": pictures} if any(pictures) else {}
        batch: dict[str, Any] = dict(
            self.processor(
                text=texts, **shown, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False,
                **options,
            )
        )  # fmt: skip
        batch = self._cut(batch)
        batch["labels"] = self._labels(batch, rows)
        return batch

    def _text(self, turns: list[Any]) -> str:
        return self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)

    def _pictures(self, turns: Sequence[Any]) -> list[Any]:
        found = []
        for turn in turns:
            content = turn.get("content")
            for part in content if isinstance(content, (list, tuple)) else ():
                if isinstance(part, Mapping) and part.get("type") in PICTURE_PARTS:
                    try:
                        picture = picture_of(part_of(part).value, Folders())
                    except RowProblem as problem:
                        raise DataError(f"UnslothVisionDataCollator: {problem}") from problem
                    found.append(decoded(picture, self._size(picture.width, picture.height)))
        return found

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if self._limit is None:
            return width, height
        if isinstance(self._limit, tuple):
            return self._limit
        sides: dict[Any, int] = {0: width, 1: height, "max": max(width, height), "min": min(width, height)}
        factor = min(1.0, self._limit / sides[self._dimension])
        return max(1, int(width * factor)), max(1, int(height * factor))

    def _cut(self, batch: dict[str, Any]) -> dict[str, Any]:
        """To `max_seq_length`, behind all pictures: what stands for one is never cut in two."""
        token_BL, limit = batch["input_ids"], self.max_seq_length
        if limit is None or token_BL.shape[1] <= limit:
            return batch
        placeholder = self.processor.image_token_id
        if bool((token_BL[:, limit:] == placeholder).any()):
            raise DataError(
                f"a row with pictures has {int(batch['attention_mask'].sum(1).max())} tokens, and max_seq_length="
                f"{limit} would cut a picture: raise it, or make pictures smaller (resize=)"
            )
        return {
            name: value[:, :limit] if value.shape[:2] == token_BL.shape[:2] and value.ndim == 2 else value
            for name, value in batch.items()
        }

    def _labels(self, batch: Mapping[str, torch.Tensor], rows: Sequence[Any]) -> torch.Tensor:
        token_BL = batch["input_ids"]
        label_BL = token_BL.clone()
        for token in self._unlearned:
            label_BL[token_BL == token] = self.ignore_index
        label_BL[batch["attention_mask"] == 0] = self.ignore_index
        if self._answers is not None:
            for index, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                (own,) = self._answers({"input_ids": [token_BL[index, :length].tolist()]})["labels"]
                label_BL[index, :length][torch.tensor(own) == IGNORED] = self.ignore_index
        for index, row in enumerate(rows):
            if isinstance(row, Mapping) and "completion" in row and self.completion_only_loss:
                label_BL[index, : self._prompt_length(row)] = self.ignore_index
        return label_BL

    def _prompt_length(self, row: Mapping[str, Any]) -> int:
        prompt = list(row["prompt"])
        text = self.processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        pictures = self._pictures(prompt)
        shown = {"images": [pictures]} if pictures else {}
        return len(self.processor(text=[text], **shown, add_special_tokens=False)["input_ids"][0])


def _turns(row: Any) -> list[Any]:
    if isinstance(row, Mapping) and "messages" in row:
        return list(row["messages"])
    if isinstance(row, Mapping) and {"prompt", "completion"} <= set(row):
        return [*row["prompt"], *row["completion"]]
    if isinstance(row, (list, tuple)):
        return list(row)
    there = ", ".join(map(repr, row)) if isinstance(row, Mapping) else type(row).__name__
    raise DataError(
        f"UnslothVisionDataCollator: expected rows with `messages`, or `prompt` and `completion`; got {there}"
    )


def _limit(resize: Any, model: Any) -> int | tuple[int, int] | None:
    if resize == "max":
        return None
    if resize == "min":
        own = getattr(getattr(model.config, "vision_config", None), "image_size", None)
        own = max(own) if isinstance(own, (list, tuple)) else own
        return own if isinstance(own, int) else _WIDTH
    if isinstance(resize, int) or (isinstance(resize, (list, tuple)) and len(resize) == 2):
        return resize if isinstance(resize, int) else (int(resize[0]), int(resize[1]))
    raise ConfigError(f"resize={resize!r}: expected 'min', 'max', a number, or (width, height)")
