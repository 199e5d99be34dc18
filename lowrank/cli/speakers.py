"""Who can be talked to: the voices of `lowrank.trained`, or a GGUF file and LoRA files beside it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lowrank.errors import ConfigError, ModelError, did_you_mean
from lowrank.generate.request import Answer, Config, Piece
from lowrank.records import Conversation
from lowrank.serve.gguf_engine import LlamaCppEngine
from lowrank.serve.refusal import Refusal
from lowrank.trained import Reading, open_trained

_CACHE_TOKENS = 16384
"""Of a conversation with a GGUF file; a model that reads less has less."""


class Speakers(Protocol):
    """What a conversation needs (talk.py)."""

    @property
    def names(self) -> list[str]: ...

    def slot(self, name: str) -> int:
        """Its number; ModelError for a name that is not there."""
        ...

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: Config,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """The next answer of each `(voice, conversation)`; `on_text` hears a single one as it comes."""
        ...

    def reading(self, name: str, conversation: Conversation) -> Reading:
        """How a voice reads it."""
        ...


class GgufSpeakers:
    """A GGUF file through llama.cpp: `base`, and each LoRA file by its name without the ending."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self._engine = engine
        self.names = [voice.name for voice in engine.voices()]

    def slot(self, name: str) -> int:
        """Its place among the names."""
        if name not in self.names:
            raise ModelError(f"there is no adapter {name!r} here{did_you_mean(name, self.names)}")
        return self.names.index(name)

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: Config,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """One after another: llama.cpp does not mix adapters in a step."""
        heard: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        answering: list[Any] = []
        try:
            for name, conversation in conversations:
                answering += self._engine.ask(name, conversation, [config])
            for each in answering:
                each.listen(heard.put)
            left = len(answering)
            while left:  # in this thread, so that Ctrl-C is heard
                piece = heard.get()
                left -= piece.finish is not None
                if on_text is not None and piece.text:
                    on_text(piece.text)
        except Refusal as refusal:
            raise ModelError(refusal.message) from refusal
        finally:
            for each in answering:
                each.cancel()
        return [each.answer for each in answering]

    def reading(self, name: str, conversation: Conversation) -> Reading:
        """All read alike: the template is the file's."""
        self.slot(name)
        try:
            prompt = self._engine.as_read(conversation)
        except Refusal as refusal:
            raise ModelError(refusal.message) from refusal
        return Reading(self._engine.chat_template(name), prompt, (self._engine.end_of_turn,))


def open_speakers(
    path: str, voices: Sequence[str], *, which: str, chat_template: str | None, notify: Callable[[str], None]
) -> tuple[Speakers, list[str]]:
    """Whoever `path` names, and the names of those of them that `voices` chooses."""
    if not path.endswith(".gguf"):
        return open_trained(path, which=which, chat_template=chat_template, notify=notify), list(voices)
    if which == "last":
        raise ConfigError(f"--last chooses among the adapters of a run, and {path} is a single model; leave it out")
    files = {Path(voice).stem: Path(voice) for voice in voices if voice.endswith(".gguf")}
    engine = LlamaCppEngine(
        Path(path), adapters=files, at_once=1, cache_tokens=_CACHE_TOKENS, chat_template=chat_template
    )
    return GgufSpeakers(engine), [Path(voice).stem if voice.endswith(".gguf") else voice for voice in voices]
