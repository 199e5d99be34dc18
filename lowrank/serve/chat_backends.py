"""Chat backends: the models of `lowrank.pipelines.inference`, or a GGUF file and LoRA files beside it."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from lowrank.checkpoints.adapter_folder import check_which, is_adapter
from lowrank.data.chat.placeholders import media_in
from lowrank.errors import ConfigError, ModelError, raise_all
from lowrank.generate.request import Answer, GenerationConfig, TokenChunk
from lowrank.pipelines.artifacts import BASE_NAME, Adapters, adapter_at, unused_name
from lowrank.pipelines.inference import (
    InferenceModel,
    RenderedPrompt,
    open_inference_model,
    refuse_unknown,
    reward_model_notice,
)
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
        refuse_unknown(name, self.names)
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
    *,
    which: str,
    chat_template: str | None,
    notify: Callable[[str], None],
    adapters: Adapters = (),
    answering: Sequence[str] = (),
    base: str | None = None,
    compile: bool = False,
) -> ChatBackend:
    """The models at `path`, and more `adapters` on the same base: paths as `open_inference_model` takes them; beside a
    .gguf file LoRA files. `answering`: names that must be among them. ConfigError for options that a .gguf file does
    not have."""
    check_which(which)
    if not is_gguf(path):
        return open_inference_model(
            path,
            which=which,
            adapters=adapters,
            answering=answering,
            chat_template=chat_template,
            base=base,
            compile=compile,
            notify=notify,
        )
    if compile:
        raise ConfigError(f"compile: {path} is run by llama.cpp, which has no layers to compile; leave it out")
    if which == "last":
        raise ConfigError(f"--last chooses among the adapters of a run, and {path} is a single model; leave it out")
    files = _lora_files(path, adapters)
    for name in answering:
        refuse_unknown(name, (BASE_NAME, *files))
    engine = LlamaCppEngine(
        Path(path), adapters=files, max_num_seqs=1, kv_cache_tokens=_CACHE_TOKENS, chat_template=chat_template
    )
    return GgufChatBackend(engine)


def adapters_among(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Those of `names` that are paths of adapters, by the names that they get (of two with one name the second has a
    number); and all of `names` with these instead. What has a separator in it, ends in .gguf or is an adapter's folder
    is a path. ModelError for a path without an adapter."""
    paths: dict[str, str] = {}
    found = []
    for given in dict.fromkeys(names):
        if is_gguf(given):
            found.append(Path(given).stem)
        elif "/" in given or os.sep in given or is_adapter(Path(given)):
            found.append(unused_name(adapter_at(given, "--adapter")[0], paths))
        else:
            found.append(given)
            continue
        paths[found[-1]] = given
    return paths, found


def _lora_files(path: str, adapters: Adapters) -> dict[str, Path]:
    """LoRA files by name. ConfigError for those that are in another layout, or have one name."""
    named = list(adapters.items() if isinstance(adapters, Mapping) else [(Path(each).stem, each) for each in adapters])
    problems = [
        f"{each}: not in llama.cpp's layout, as a LoRA beside a .gguf file has to be; `lowrank export {each} --to "
        "lora_gguf` writes it so"
        for _, each in named
        if not is_gguf(each)
    ]
    problems += [
        f"{each}: {name!r} is another's name already; in Python, adapters={{'NAME': {each!r}}} gives it one"
        for number, (name, each) in enumerate(named)
        if name in (BASE_NAME, *(other for other, _ in named[:number]))
    ]
    raise_all(ConfigError, f"these adapters cannot be loaded on {path}:", problems)
    return {name: Path(each) for name, each in named}
