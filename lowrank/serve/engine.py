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
    """A chat that is read with variables of its own for the template (`enable_thinking` and their kind)."""

    variables: Mapping[str, Any] = field(default_factory=dict)


Question = Conversation | str | np.ndarray
"""A chat, a text to go on with, or its tokens (L)."""


class PendingAnswer(Protocol):
    """An answer on its way (generate/generation.py)."""

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        ...

    def listen(self, listener: Callable[[TokenChunk], None]) -> None:
        """Have every chunk told, those of the past first; from any thread."""
        ...

    def cancel(self) -> None:
        """Stop, and free what it holds."""
        ...


@dataclass(frozen=True)
class ServedModel:
    """A name one may ask."""

    name: str
    parent: str | None = None
    """The base's name, for an adapter."""
    version: int = 0
    """How often it was published; 0 for the base."""
    resident: bool = True
    """Its weights are in memory; others come when they are asked for."""
    created: int = 0
    """Seconds since 1970."""


@dataclass(frozen=True)
class Load:
    """What an engine does at the moment."""

    running: int
    waiting: int
    free_tokens: int | None = None
    """Room in the KV cache."""


class ServeEngine(Protocol):
    """`submit`, `embed`, `publish` and `unpublish` may block; they are called from threads of their own. All raise
    `ApiError`."""

    name: str
    """As `--engine` names it, and what answers and logs say."""

    @property
    def vocabulary(self) -> int:
        """Tokens there are logits of."""
        ...

    def start(self) -> None:
        """Load what takes long; called once, before anything is asked."""
        ...

    def close(self) -> None:
        """Whatever is being answered ends as cancelled."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        ...

    def served_models(self) -> Sequence[ServedModel]:
        """What may be asked: the base first, then each adapter."""
        ...

    def load(self) -> Load:
        """How many answers are in progress, and how many wait."""
        ...

    def submit(self, name: str, question: Question, configs: Sequence[GenerationConfig]) -> list[PendingAnswer]:
        """One answer for each of `configs`."""
        ...

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """(D) A text's vector, and how many tokens it has."""
        ...

    def token_text(self, token: int) -> str:
        """One token as text, for log-probabilities."""
        ...

    def chat_template(self, name: str) -> str:
        """The Jinja source that a model is asked through; empty if there is none."""
        ...

    def chat_variables(self, name: str) -> Mapping[str, Any]:
        """What its chat template is given with every conversation (`chat_template_kwargs` of its settings)."""
        ...

    def publish(self, name: str, path: str) -> ServedModel:
        """Load an adapter, or a new version of one."""
        ...

    def unpublish(self, name: str) -> None:
        """Take an adapter out; answers in progress with it come to their end."""
        ...


@runtime_checkable
class ImageEngine(Protocol):
    """An engine that knows whether its models may be shown pictures; one that does not say so is shown none."""

    @property
    def image_problem(self) -> str | None:
        """Why they may not, in words; None if they may."""
        ...
