"""Requests to the generator (`Prompt`, `GenerationConfig`) and what it gives back (`TokenChunk`, `Answer`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from lowrank.batches import BASE_SLOT
from lowrank.errors import LowrankError
from lowrank.segments import Media
from lowrank.settings import NonNegative, Positive, Settings


class RequestError(LowrankError):
    """A request that cannot be served: too long, or options that exclude each other."""

    exit_code = 2


class ContextLengthExceeded(RequestError):
    """The question alone fills the context, or with its answer the cache."""


class GenerationConfig(Settings):
    """How answers are drawn."""

    max_new_tokens: Positive = 512
    """Tokens of one answer at the most."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token; higher is livelier."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    top_k: NonNegative = 0
    """Draw from this many likeliest tokens; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out tokens with less than this share of the likeliest token's probability (arXiv:2407.01082)."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1 makes tokens that occurred, in the question too, less likely (arXiv:1909.05858)."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off the logit of every token the answer has already (OpenAI's meaning)."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off the logit of a token once for each time the answer has it (OpenAI's meaning)."""
    logit_bias: dict[int, float] = Field(default_factory=dict)
    """Added to the logits of these token ids."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it."""
    seed: int | None = None
    """Makes draws repeatable, whatever else is answered at the same time."""
    logprobs: Annotated[int, Field(ge=0, le=64)] | None = None
    """Report the log-probability of each token, and of this many likeliest ones, as the model gives them."""
    json_schema: dict[str, Any] | None = None
    """Answer with JSON of this schema and nothing else. Needs `pip install 'lowrank-llm[json]'`."""
    preserved_tokens: tuple[str, ...] = ()
    """Control tokens that an answer's text shows; it leaves out the others."""
    grammar: str | None = None
    """Answer by this grammar (llguidance's Lark) and nothing else, in the place of a schema; needs the same."""


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, and by whom: a slot of the bank, or -1 for the bare base."""

    token_L: np.ndarray
    slot: int = BASE_SLOT
    media: Media | None = None
    """The pictures that its tokens stand for."""


@dataclass(frozen=True)
class TokenChunk:
    """One step of an answer.

    `text` is what may be shown now: it is empty while half a character, or what may become a stop text, is held
    back. `finish` is None until the last chunk: stop (a stop token or text), length, cancelled, error. The last chunk
    has no token if it was a stop token.
    """

    token: int | None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest tokens."""
    finish: str | None = None
    error: str | None = None
    refused: bool = False
    """With an error: what was asked is at fault, and neither the model nor the adapter."""


@dataclass(frozen=True)
class Answer:
    """A whole answer: its tokens without the stop token, its text without the stop text."""

    tokens: list[int]
    text: str
    finish: str
    error: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_tokens: int = 0
    stop_token: int | None = None
    """The stop token that ended it, where one did."""
    cached_tokens: int = 0
    """Of the prompt, those whose keys were there already."""
