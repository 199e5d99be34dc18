"""Answers from the base and its adapters: transformers' own `generate`, routed.

Rows of one batch may belong to different adapters or to the bare base; each row's answer is what it
would be alone with its adapter. Attention and caching are the model's own; only the linears are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from lowrank.adapters.bank import Bank
from lowrank.models.base import Base
from lowrank.models.quiet import quiet_transformers
from lowrank.settings import NonNegative, Positive, Settings


class Config(Settings):
    """How answers are drawn."""

    max_new_tokens: Positive = 512
    """Tokens of one answer at the most."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; higher is livelier."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: NonNegative = 0
    """Draw from this many likeliest tokens; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred less likely."""
    seed: int | None = None
    """Makes draws repeatable."""


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and by whom: a slot of the bank, or -1 for the bare base."""

    token_L: np.ndarray
    slot: int = -1


class _Callback(BaseStreamer):
    """Hands on each new token of a single prompt; the prompt itself comes first and is left out."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.on_token(int(value))
        self.seen_prompt = True

    def end(self) -> None:
        pass


def generate(
    base: Base,
    bank: Bank,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    stop_tokens: frozenset[int],
    rows_at_once: int = 64,
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the order given, without the stop token.

    `on_token` hears each token of a single prompt as it comes. Prompts of similar length go together,
    so padding is small.
    """
    assert on_token is None or len(prompts) == 1, "one prompt can be streamed at a time"
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_L))
    answers: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), rows_at_once):
        members = sorted(order[first : first + rows_at_once], key=lambda index: prompts[index].slot)
        rows = _generate_rows(base, bank, [prompts[index] for index in members], config, stop_tokens, on_token)
        for index, row in zip(members, rows):
            answers[index] = row
    return answers


def _generate_rows(
    base: Base,
    bank: Bank,
    prompts: list[Prompt],
    config: Config,
    stop_tokens: frozenset[int],
    on_token: Callable[[int], None] | None,
) -> list[list[int]]:
    """One batch, sorted by slot, left-padded."""
    longest = max(len(prompt.token_L) for prompt in prompts)
    token_BL = torch.zeros(len(prompts), longest, dtype=torch.int64)
    seen_BL = torch.zeros_like(token_BL)
    for row, prompt in enumerate(prompts):
        token_BL[row, longest - len(prompt.token_L) :] = torch.from_numpy(prompt.token_L.astype(np.int64))
        seen_BL[row, longest - len(prompt.token_L) :] = 1
    bank.routing.set(len(prompts), _ranges([prompt.slot for prompt in prompts]))
    if config.seed is not None:
        torch.manual_seed(config.seed)
    with torch.no_grad(), base.using_attention(base.own_attention), quiet_transformers():
        output_BL = base.model.generate(
            input_ids=token_BL.to(base.device),
            attention_mask=seen_BL.to(base.device),
            generation_config=_generation_config(config, stop_tokens),
            streamer=_Callback(on_token) if on_token else None,
        )
    return [_until_stop(row, stop_tokens) for row in output_BL[:, longest:].tolist()]


def _ranges(slots: list[int]) -> tuple[tuple[int, int, int], ...]:
    """(slot, first row, end row) of sorted slots."""
    edges = [index for index in range(len(slots)) if index == 0 or slots[index] != slots[index - 1]]
    return tuple((slots[a], a, b) for a, b in zip(edges, [*edges[1:], len(slots)]))


def _generation_config(config: Config, stop_tokens: frozenset[int]) -> GenerationConfig:
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "do_sample": config.temperature > 0,
        "eos_token_id": sorted(stop_tokens) or None,
        "pad_token_id": min(stop_tokens, default=0),
        "repetition_penalty": config.repetition_penalty,
    }
    if config.temperature > 0:
        settings |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    return GenerationConfig(**settings)


def _until_stop(tokens: list[int], stop_tokens: frozenset[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in stop_tokens:
            return tokens[:index]
    return tokens
