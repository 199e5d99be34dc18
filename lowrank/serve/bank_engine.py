"""The engine of our own: adapters of a bank, all in the same forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.data.rendering import Renderer
from lowrank.errors import LowrankError, ModelError
from lowrank.generate.embedding import Pooling
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.published import Published
from lowrank.generate.request import Config, TooLong
from lowrank.models.base import Base
from lowrank.records import Conversation
from lowrank.serve.adapters import AdapterShelf
from lowrank.serve.engine import Answering, Load, Question, Voice
from lowrank.serve.questions import tokens_of
from lowrank.serve.refusal import Refusal


class BankEngine:
    """`Engine` (engine.py) on a `Generator`."""

    name = "torch"

    def __init__(
        self,
        base: Base,
        bank: Bank,
        renderer: Renderer,
        slots: Mapping[str, int],
        *,
        renderers: Mapping[str, Renderer] | None = None,
        folders: Mapping[str, Path] | None = None,
        roots: Sequence[Path] = (),
        config: GeneratorConfig | None = None,
        most_resident: int = 32,
    ) -> None:
        """`slots`: what may be asked already, the base among them; `folders`: where its adapters came from.

        `renderers`: of names that read a conversation otherwise than by `renderer`. Adapters a client publishes come
        from folders within `roots`.
        """
        self.base = base
        self.renderer = renderer
        self._renderers = renderers or {}
        self.generator = Generator(base, bank, config)
        published = Published(self.generator, slots)
        self.shelf = AdapterShelf(published, folders or {}, roots, most_resident=most_resident)

    def start(self) -> None:
        """Make steps in a thread."""
        self.generator.start()

    def close(self) -> None:
        """End that thread."""
        self.generator.close()

    @property
    def alive(self) -> bool:
        """Steps are made."""
        return self.generator.threaded

    def voices(self) -> list[Voice]:
        """The base first."""
        always = [Voice(name) for name in self.shelf.always]
        parent = self.shelf.always[0] if self.shelf.always else None
        rest = [
            Voice(name, parent, entry.version, resident, entry.created)
            for name, (entry, resident) in self.shelf.registered().items()
        ]
        return always + rest

    def load(self) -> Load:
        """At this moment."""
        return Load(self.generator.num_running, self.generator.num_waiting, self.generator.free_tokens)

    def ask(self, name: str, question: Question, configs: Sequence[Config]) -> list[Answering]:
        """Refusal for an unknown name, a question that is too long or that the chat template refuses."""
        answers: list[Answering] = []
        try:
            renderer = self._renderer_of(name)
            token_L, stop_tokens = self._tokens(question, renderer), renderer.stop_tokens
            for config in configs:
                answers.append(self.shelf.submit(name, token_L, config, stop_tokens))
        except BaseException as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, TooLong):
                param = "messages" if isinstance(question, Conversation) else "prompt"
                raise Refusal(400, str(error), code="context_length_exceeded", param=param) from error
            if isinstance(error, LowrankError):
                raise Refusal(400, str(error)) from error
            raise
        return answers

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """Between two steps of the answers in the making."""
        token_L = self._tokens(text, self.renderer)
        try:
            return self.shelf.embed(name, token_L, pooling), len(token_L)
        except TooLong as error:
            raise Refusal(400, str(error), code="context_length_exceeded", param="input") from error
        except LowrankError as error:
            raise Refusal(400, str(error), param="input") from error

    def token_text(self, token: int) -> str:
        """One token by itself, special or not."""
        return self.base.tokenizer.decode([token])

    def chat_template(self, name: str) -> str:
        """The one it was trained with."""
        try:
            return self._renderer_of(name).chat_template
        except ModelError:
            return ""

    def publish(self, name: str, path: str) -> Voice:
        """From a folder within the roots."""
        try:
            self.shelf.publish(name, path)
        except LowrankError as error:
            raise Refusal(400, f"the adapter does not fit: {error}", param="path") from error
        return next(voice for voice in self.voices() if voice.name == name)

    def withdraw(self, name: str) -> None:
        """Its answers in progress go on to their end."""
        self.shelf.withdraw(name)

    def _renderer_of(self, name: str) -> Renderer:
        return self._renderers.get(name, self.renderer)

    def _tokens(self, question: Question, renderer: Renderer) -> np.ndarray:
        vocabulary = self.base.model.get_output_embeddings().weight.shape[0]
        return tokens_of(question, renderer, self.base.tokenizer, vocabulary)
