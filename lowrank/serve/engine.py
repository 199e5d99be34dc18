"""What a server needs of whatever makes the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lowrank.generate.embedding import Pooling
from lowrank.generate.request import Answer, Config, Piece
from lowrank.records import Conversation

Question = Conversation | str | np.ndarray
"""A chat, a text to go on with, or its tokens (L)."""


class Answering(Protocol):
    """An answer on its way (generate/generation.py)."""

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        ...

    def listen(self, listener: Callable[[Piece], None]) -> None:
        """Have every piece told, those of the past first; from any thread."""
        ...

    def cancel(self) -> None:
        """Stop, and free what it holds."""
        ...


@dataclass(frozen=True)
class Voice:
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
    """Room in the key-value cache."""


class Engine(Protocol):
    """`ask`, `publish` and `withdraw` may block; they are called from threads of their own. All raise `Refusal`."""

    name: str

    def start(self) -> None: ...

    def close(self) -> None:
        """Whatever is being answered ends as cancelled."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can answer."""
        ...

    def voices(self) -> Sequence[Voice]: ...

    def load(self) -> Load: ...

    def ask(self, name: str, question: Question, configs: Sequence[Config]) -> list[Answering]:
        """One answer for each of `configs`."""
        ...

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """(D) A text's vector, and how many tokens it has."""
        ...

    def token_text(self, token: int) -> str: ...

    def chat_template(self, name: str) -> str:
        """The Jinja source that a voice is asked through; empty if there is none."""
        ...

    def publish(self, name: str, path: str) -> Voice:
        """Load an adapter, or a new version of one."""
        ...

    def withdraw(self, name: str) -> None: ...
