"""The protocol of a serving engine: what the server needs of whatever generates the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from lowrank.generate.embedding import Pooling
from lowrank.generate.request import Answer, GenerationConfig, TokenChunk
from lowrank.records import Conversation


@dataclass(frozen=True)
class ChatPrompt(Conversation):
    """A chat with variables of its own for the chat template, such as `enable_thinking`."""

    variables: Mapping[str, Any] = field(default_factory=dict)


PromptType = Conversation | str | np.ndarray
"""A chat, a text to continue, or the int64 tokens (L) of such a text."""


class PendingAnswer(Protocol):
    """An answer in progress (generate/generation.py)."""

    @property
    def answer(self) -> Answer:
        """The answer as far as it is generated."""
        ...

    def listen(self, listener: Callable[[TokenChunk], None]) -> None:
        """Call `listener` with every chunk, those of the past first; from any thread."""
        ...

    def cancel(self) -> None:
        """Stop generating, and free its memory."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can name in requests: the base or an adapter."""

    name: str
    parent: str | None = None
    """The base's name, for an adapter."""
    version: int = 0
    """The number of times it was published; 0 for the base."""
    resident: bool = True
    """Its weights are in memory; those of others are loaded by the first request for them."""
    created: int = 0
    """Seconds since 1970."""


@dataclass(frozen=True)
class Load:
    """The numbers of answers that are in progress and that wait."""

    running: int
    waiting: int
    free_tokens: int | None = None
    """Tokens that the KV cache still has room for; None: the engine does not know."""


class ServeEngine(Protocol):
    """Generates the answers of a server. `submit`, `embed`, `publish` and `unpublish` may block; the server calls them
    in threads of a pool. They raise `ApiError`."""

    name: str
    """The engine's name in `--engine`, in replies and in logs."""

    @property
    def vocabulary(self) -> int:
        """The size of the vocabulary: how many tokens there are logits of."""
        ...

    def start(self) -> None:
        """Load the model; called once, before any request."""
        ...

    def close(self) -> None:
        """Stop the engine; answers in progress end as cancelled."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the engine can answer requests."""
        ...

    def served_models(self) -> Sequence[ServedModel]:
        """The models that requests can name: the base first, then each adapter."""
        ...

    def load(self) -> Load:
        """The engine's load at this moment."""
        ...

    def submit(self, name: str, question: PromptType, configs: Sequence[GenerationConfig]) -> list[PendingAnswer]:
        """Begin one answer for each of `configs` with model `name`."""
        ...

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """((D) float32 embedding of a text by model `name`, its number of tokens)."""
        ...

    def token_text(self, token: int) -> str:
        """The text of one token, for replies with log-probabilities."""
        ...

    def chat_template(self, name: str) -> str:
        """The Jinja source of a model's chat template; empty if it has none."""
        ...

    def chat_variables(self, name: str) -> Mapping[str, Any]:
        """Variables of a model's chat template for all conversations (`chat_template_kwargs` of its settings)."""
        ...

    def publish(self, name: str, path: str) -> ServedModel:
        """Load the adapter in folder `path` as `name`, or as a new version of it."""
        ...

    def unpublish(self, name: str) -> None:
        """Remove an adapter; answers in progress with it run to their end."""
        ...


@runtime_checkable
class ImageEngine(Protocol):
    """An engine that says whether requests may have pictures; other engines get none."""

    @property
    def image_problem(self) -> str | None:
        """Why requests may not have pictures, for people; None if they may."""
        ...
