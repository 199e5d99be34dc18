"""The engine for NVIDIA GPUs with vLLM: one base, adapters as vLLM's `LoRARequest`s. `pip install lowrank[serve,vllm]`.

Written from the source of vLLM 0.32.0, which goes with our torch (vllm/v1/engine/async_llm.py, vllm/lora/request.py;
0.33.0 is the same here). It has not been run on a GPU yet; its parts that need none are tested.

vLLM knows cached keys by an adapter's name and path (vllm/v1/core/kv_cache_utils.py), so a new version under the old
name would read the keys of the old one (vllm #42125). Here every version has a name and a number of its own, and its
files are copied, so that what vLLM reads again later is what it read first.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowrank.checkpoints.atomic import current
from lowrank.data.rendering import Renderer
from lowrank.errors import LowrankError, ModelError
from lowrank.generate.embedding import Pooling
from lowrank.generate.request import Answer, Config, Piece
from lowrank.generate.telling import Listener, Telling
from lowrank.models.config import Config as ModelConfig
from lowrank.models.loading import locate
from lowrank.records import Conversation
from lowrank.serve.engine import Answering, Load, Question, Voice
from lowrank.serve.folders import adapter_within, unknown_model
from lowrank.serve.questions import tokens_of
from lowrank.serve.refusal import Refusal
from lowrank.serve.vllm_words import pieces_of, sampling_options

BASE = "base"
Result = TypeVar("Result")


@dataclass(frozen=True)
class Vllm:
    """What is used of vLLM: an engine, and how to say what it is asked."""

    llm: Any
    """`vllm.v1.engine.async_llm.AsyncLLM`"""
    sampling: Callable[..., Any]
    """`vllm.SamplingParams` with `output_kind=RequestOutputKind.DELTA`"""
    schema: Callable[[dict[str, Any]], Any]
    """`StructuredOutputsParams` of a JSON schema."""
    lora: Callable[[str, int, str], Any]
    """`LoRARequest` of a name, a number and a path."""


def open_vllm(model: ModelConfig, *, at_once: int, most_loras: int, max_rank: int) -> Vllm:
    """Load `model` on the GPU. Raises ModelError where vLLM is not installed."""
    try:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = f"--engine vllm needs {error.name}: pip install 'lowrank[serve,vllm]' (Linux and a GPU)"
        raise ModelError(message) from error
    arguments = AsyncEngineArgs(
        model=locate(model.path),
        revision=model.revision,
        dtype=model.dtype,
        enable_lora=True,
        max_loras=most_loras,
        max_lora_rank=max_rank,
        max_num_seqs=at_once,
        disable_log_stats=True,
    )
    return Vllm(
        llm=AsyncLLM.from_engine_args(arguments),
        sampling=lambda **options: SamplingParams(**options, output_kind=RequestOutputKind.DELTA),
        schema=lambda schema: StructuredOutputsParams(json=schema),
        lora=LoRARequest,
    )


@dataclass
class _Version:
    """One version of an adapter, as vLLM knows it."""

    name: str
    number: int
    created: int
    request: Any
    folder: Path
    """Where its files were copied."""
    users: int = 0
    retired: bool = False


class VllmEngine:
    """`Engine` (engine.py) on vLLM, which has an event loop in a thread of its own here."""

    name = "vllm"

    def __init__(
        self,
        vllm: Vllm,
        tokenizer: Any,
        renderers: Mapping[str, Renderer],
        adapters: Mapping[str, Path],
        *,
        roots: Sequence[Path] = (),
        at_once: int = 64,
    ) -> None:
        """`renderers`: how the base (`base`) and each adapter read a conversation; the base's for all others."""
        self._vllm, self._tokenizer, self._renderers = vllm, tokenizer, renderers
        self._roots = tuple(root.resolve() for root in roots)
        self._at_once = at_once
        self._reach = int(vllm.llm.model_config.max_model_len)
        self._copies = tempfile.TemporaryDirectory(prefix="lowrank-vllm-")
        self._ids = itertools.count(1)
        self._versions: dict[str, _Version] = {}
        self._asked: set[_Answer] = set()
        self._lock = threading.RLock()
        self._publishing = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lowrank-vllm", daemon=True)
        self._thread.start()
        for name, folder in adapters.items():
            self._add(name, folder)

    def start(self) -> None:
        """It runs since it was made."""

    def close(self) -> None:
        """Whatever is being answered ends as cancelled."""
        with self._lock:
            asked = list(self._asked)
        for answer in asked:
            answer.cancel()
        for answer in asked:
            answer.over.wait(10)
        self._vllm.llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._copies.cleanup()

    @property
    def alive(self) -> bool:
        """Its process runs and has not failed."""
        return self._thread.is_alive() and not self._vllm.llm.errored

    def voices(self) -> list[Voice]:
        """The base first."""
        with self._lock:
            found = [Voice(each.name, BASE, each.number, True, each.created) for each in self._versions.values()]
        return [Voice(BASE), *found]

    def load(self) -> Load:
        """As many as vLLM answers at once run; others wait."""
        with self._lock:
            return Load(min(len(self._asked), self._at_once), max(0, len(self._asked) - self._at_once))

    def ask(self, name: str, question: Question, configs: Sequence[Config]) -> list[Answering]:
        """Refusal for an unknown name, a question that is too long or that the chat template refuses."""
        with self._lock:
            if name != BASE and name not in self._versions:
                raise unknown_model(name, [voice.name for voice in self.voices()])
        renderer = self._renderer_of(name)
        try:
            token_L = tokens_of(question, renderer, self._tokenizer, len(self._tokenizer))
        except LowrankError as error:
            raise Refusal(400, str(error)) from error
        if not len(token_L):
            raise Refusal(400, "the prompt has no tokens")
        if len(token_L) >= self._reach:
            message = f"the conversation has {len(token_L)} tokens and the model reads {self._reach}"
            param = "messages" if isinstance(question, Conversation) else "prompt"
            raise Refusal(400, message, code="context_length_exceeded", param=param)
        prompt = {"prompt_token_ids": token_L.tolist()}
        most = self._reach - len(token_L)
        samplings = [self._sampling(config, renderer.stop_tokens, most) for config in configs]
        answers: list[Answering] = []
        for config, sampling in zip(configs, samplings):
            version = self._use(name)
            answer = _Answer(self._loop, len(token_L))
            with self._lock:
                self._asked.add(answer)
            answers.append(answer)
            work = self._run(answer, prompt, sampling, version, config.logprobs or 0)
            self._loop.call_soon_threadsafe(answer.begin, work, partial(self._end, answer, version))
        return answers

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """Never: vLLM loads a model either to answer or to embed."""
        raise Refusal(400, "there are no embeddings with --engine vllm; serve with --engine torch")

    def token_text(self, token: int) -> str:
        """One token by itself, special or not."""
        return self._tokenizer.decode([token])

    def chat_template(self, name: str) -> str:
        """The one it was trained with."""
        try:
            return self._renderer_of(name).chat_template
        except ModelError:
            return ""

    def publish(self, name: str, path: str) -> Voice:
        """From a folder within the roots."""
        if name == BASE:
            raise Refusal(400, f"{name!r} is the base and cannot be replaced", param="name")
        self._add(name, adapter_within(self._roots, path))
        return next(voice for voice in self.voices() if voice.name == name)

    def withdraw(self, name: str) -> None:
        """Its answers in progress go on to their end."""
        if name == BASE:
            raise Refusal(400, f"{name!r} is the base and cannot be taken away", param="name")
        with self._lock:
            if name not in self._versions:
                raise unknown_model(name, [voice.name for voice in self.voices()])
            version = self._versions.pop(name)
        self._retire(version)

    def _sampling(self, config: Config, stop_tokens: frozenset[int], most: int) -> Any:
        options = sampling_options(config, stop_tokens, min(config.max_new_tokens, most))
        try:
            if config.json_schema is not None:
                options["structured_outputs"] = self._vllm.schema(config.json_schema)
            return self._vllm.sampling(**options)
        except ValueError as error:
            raise Refusal(400, f"vLLM: {error}") from error

    def _renderer_of(self, name: str) -> Renderer:
        return self._renderers.get(name, self._renderers[BASE])

    def _add(self, name: str, folder: Path) -> None:
        """Copy the files, have vLLM load them, and only then let the name mean them."""
        with self._publishing:
            identity = next(self._ids)
            copy = Path(self._copies.name) / str(identity)
            shutil.copytree(current(folder), copy)
            number = self._versions[name].number + 1 if name in self._versions else 1
            request = self._vllm.lora(f"{name}@{identity}", identity, str(copy))
            try:
                self._in_loop(self._vllm.llm.add_lora(request))
            except Exception as error:
                shutil.rmtree(copy, ignore_errors=True)
                raise Refusal(400, f"vLLM cannot load {folder}: {error}", param="path") from error
            version = _Version(name, number, int(time.time()), request, copy)
            with self._lock:
                before, self._versions[name] = self._versions.get(name), version
            if before is not None:
                self._retire(before)

    def _use(self, name: str) -> _Version | None:
        """The version that answers; it stays until `_leave`."""
        if name == BASE:
            return None
        with self._lock:
            if name not in self._versions:
                raise unknown_model(name, [voice.name for voice in self.voices()])
            version = self._versions[name]
            version.users += 1
            return version

    def _leave(self, version: _Version) -> None:
        with self._lock:
            version.users -= 1
        if version.retired:
            self._retire(version)

    def _retire(self, version: _Version) -> None:
        """Have vLLM forget it, once its last answer has ended."""
        with self._lock:
            version.retired = True
            if version.users:
                return
        asyncio.run_coroutine_threadsafe(self._forget(version), self._loop)

    async def _forget(self, version: _Version) -> None:
        await self._vllm.llm.remove_lora(version.request.lora_int_id)
        shutil.rmtree(version.folder, ignore_errors=True)

    async def _run(self, answer: _Answer, prompt: Any, sampling: Any, version: _Version | None, told: int) -> None:
        """vLLM frees what it holds for a request when this task is cancelled."""
        request = None if version is None else version.request
        outputs = self._vllm.llm.generate(prompt, sampling, f"lowrank-{next(self._ids)}", lora_request=request)
        async for output in outputs:
            answer.cached = output.num_cached_tokens or answer.cached
            for piece in pieces_of(output.outputs[0], told):
                answer.telling.tell(piece)

    def _end(self, answer: _Answer, version: _Version | None) -> None:
        """Its task is over, however it ended."""
        with self._lock:
            self._asked.discard(answer)
        if version is not None:
            self._leave(version)

    def _in_loop(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Answer:
    """`Answering` (engine.py) of one request to vLLM."""

    def __init__(self, loop: asyncio.AbstractEventLoop, prompt_tokens: int) -> None:
        self.telling = Telling()
        self.cached = 0
        self.over = threading.Event()
        self._loop, self._prompt_tokens = loop, prompt_tokens
        self._task: asyncio.Task[None] | None = None

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        return self.telling.answer(prompt_tokens=self._prompt_tokens, reused_tokens=self.cached)

    def listen(self, listener: Listener) -> None:
        """Every piece, those of the past first."""
        self.telling.listen(listener)

    def cancel(self) -> None:
        """vLLM aborts a request whose task is cancelled."""
        self._loop.call_soon_threadsafe(self._cancel)

    def begin(self, work: Coroutine[Any, Any, None], on_end: Callable[[], None]) -> None:
        """In the loop's thread, as all that follows."""
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(lambda task: self._finish(task, on_end))

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[None], on_end: Callable[[], None]) -> None:
        error = None if task.cancelled() else task.exception()
        if not self.telling.over and task.cancelled():
            self.telling.tell(Piece(None, finish="cancelled"))
        elif not self.telling.over:
            reason = "it ended in the middle of an answer" if error is None else str(error)
            self.telling.tell(Piece(None, finish="error", error=f"vLLM: {reason}"))
        on_end()
        self.over.set()
