"""Chat backends: the models of `lowrank.pipelines.inference`, or a GGUF file and LoRA files beside it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lowrank.data.chat.placeholders import media_in
from lowrank.errors import ConfigError, ModelError, did_you_mean
from lowrank.generate.request import Answer, GenerationConfig, TokenChunk
from lowrank.pipelines.inference import InferenceModel, RenderedPrompt, open_inference_model, reward_model_notice
from lowrank.pipelines.resolve import is_gguf
from lowrank.records import Conversation
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.engines.llama_cpp import LlamaCppEngine

_CACHE_TOKENS = 16384
"""Of a conversation with a GGUF file; a model that reads less has less."""


class ChatBackend(Protocol):
    """What an interactive chat needs of a model (cli/chat_repl.py)."""

    @property
    def names(self) -> list[str]:
        """The names of the models: adapters, and `base`."""
        ...

    def slot(self, name: str) -> int:
        """Its number; ModelError for a name that is not there."""
        ...

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: GenerationConfig,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """The next answer of each `(model, conversation)`; `on_text` is called with a single one in pieces."""
        ...

    def render_prompt(self, name: str, conversation: Conversation) -> RenderedPrompt:
        """How a model reads it."""
        ...


def backend_reward_model_notice(backend: ChatBackend, names: Sequence[str]) -> str | None:
    """A notice for people before these models answer, where some of them are reward models; None otherwise."""
    reward_models = backend.reward_models_among(names) if isinstance(backend, InferenceModel) else []
    return reward_model_notice(reward_models) if reward_models else None


class GgufChatBackend:
    """A GGUF file through llama.cpp: `base`, and each LoRA file by its name without the ending."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self._engine = engine
        self.names = [served.name for served in engine.served_models()]

    def slot(self, name: str) -> int:
        """Its place among the names."""
        if name not in self.names:
            raise ModelError(f"there is no adapter {name!r} here{did_you_mean(name, self.names)}")
        return self.names.index(name)

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: GenerationConfig,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """One after another: llama.cpp does not mix adapters in a step."""
        if any(media_in(conversation) for _, conversation in conversations):
            raise ModelError(
                "a GGUF file is run by llama.cpp's text model, which is shown no pictures; ask the model it was made of"
            )
        received: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
        answering: list[Any] = []
        try:
            for name, conversation in conversations:
                answering += self._engine.submit(name, conversation, [config])
            for each in answering:
                each.listen(received.put)
            left = len(answering)
            while left:  # in this thread, so that Ctrl-C is handled
                chunk = received.get()
                left -= chunk.finish is not None
                if on_text is not None and chunk.text:
                    on_text(chunk.text)
        except ApiError as refusal:
            raise ModelError(refusal.message) from refusal
        finally:
            for each in answering:
                each.cancel()
        return [each.answer for each in answering]

    def close(self) -> None:
        """End llama.cpp."""
        self._engine.close()

    def render_prompt(self, name: str, conversation: Conversation) -> RenderedPrompt:
        """All read alike: the template is the file's."""
        self.slot(name)
        try:
            prompt = self._engine.as_read(conversation)
        except ApiError as refusal:
            raise ModelError(refusal.message) from refusal
        return RenderedPrompt(self._engine.chat_template(name), prompt, (self._engine.end_of_turn,))


def open_chat_backend(
    path: str,
    model_names: Sequence[str],
    *,
    which: str,
    chat_template: str | None,
    notify: Callable[[str], None],
    base: str | None = None,
    compile: bool = False,
) -> tuple[ChatBackend, list[str]]:
    """The models at `path`, and those of `model_names` among them by their full names. ConfigError for options that a
    .gguf file does not have."""
    if not is_gguf(path):
        trained = open_inference_model(
            path, which=which, chat_template=chat_template, base=base, compile=compile, notify=notify
        )
        return trained, list(model_names)
    if compile:
        raise ConfigError(f"compile: {path} is run by llama.cpp, which has no layers to compile; leave it out")
    if which == "last":
        raise ConfigError(f"--last chooses among the adapters of a run, and {path} is a single model; leave it out")
    files = {Path(name).stem: Path(name) for name in model_names if is_gguf(name)}
    engine = LlamaCppEngine(
        Path(path), adapters=files, max_num_seqs=1, kv_cache_tokens=_CACHE_TOKENS, chat_template=chat_template
    )
    return GgufChatBackend(engine), [Path(name).stem if is_gguf(name) else name for name in model_names]
