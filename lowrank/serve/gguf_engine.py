"""The engine for GGUF files: llama.cpp's own server, in this process, through the wheel xllamacpp.

It listens on a free loopback port behind a key of its own and is asked for tokens only; templates, limits and
OpenAI's forms stay ours. LoRA adapters are GGUF files too and are loaded when it starts; each request says which one
counts. Where there are any, llama.cpp's prompt cache is off: it does not know of adapters and would hand the keys of
one to another (llama.cpp #26207).
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.errors import ModelError
from lowrank.generate.request import Answer, Config, Piece
from lowrank.records import Conversation, Message
from lowrank.serve.engine import Answering, Load, Question, Voice
from lowrank.serve.refusal import Refusal

BASE = "base"
_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")
"""In the order of generate/sampling.py."""


class LlamaCppEngine:
    """`Engine` (engine.py) on one file. Raises ModelError if it cannot be loaded."""

    name = "llama.cpp"

    def __init__(
        self,
        path: Path,
        *,
        adapters: Mapping[str, Path] | None = None,
        at_once: int = 8,
        cache_tokens: int = 65536,
        threads: int | None = None,
        gpu_layers: int = -1,
    ) -> None:
        """`cache_tokens` are shared by the `at_once` answers that are made at the same time."""
        if importlib.util.find_spec("xllamacpp") is None:
            raise ModelError("serving a GGUF file needs llama.cpp: pip install lowrank[serve,gguf]")
        self._names = [BASE, *(adapters or {})]
        files = list((adapters or {}).values())
        for file in (path, *files):
            if not file.is_file():
                raise ModelError(f"{file}: no such file")
        self._key = secrets.token_urlsafe(16)
        self._reuses_prompts = not files
        self._server: Any = _start(path, files, self._key, at_once, cache_tokens, threads, gpu_layers)
        host, _, port = self._server.listening_address.removeprefix("http://").rpartition(":")
        self._address = (host, int(port))
        described = self._call("GET", "/props")
        self._template = str(described.get("chat_template", ""))
        self._context = int(described["default_generation_settings"]["n_ctx"])
        self._texts: dict[int, str] = {}
        self._at_once = at_once
        self._answers: set[_Answer] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(at_once, thread_name_prefix="lowrank-llama")

    def start(self) -> None:
        """It runs since it was made."""

    def close(self) -> None:
        """Whatever is being answered ends as cancelled."""
        with self._lock:
            answers = list(self._answers)
        for answer in answers:
            answer.cancel()
        self._pool.shutdown(wait=True)
        self._server = None

    @property
    def alive(self) -> bool:
        """It was not closed."""
        return self._server is not None

    def voices(self) -> list[Voice]:
        """The file itself first."""
        return [Voice(BASE), *(Voice(name, BASE, 1) for name in self._names[1:])]

    def load(self) -> Load:
        """As many as llama.cpp has slots run; others wait."""
        with self._lock:
            return Load(min(len(self._answers), self._at_once), max(0, len(self._answers) - self._at_once))

    def ask(self, name: str, question: Question, configs: Sequence[Config]) -> list[Answering]:
        """Refusal for an unknown name, a question that is too long or that the chat template refuses."""
        if name not in self._names:
            there = ", ".join(self._names)
            raise Refusal(404, f"there is no model {name!r} here; there are {there}", code="model_not_found")
        tokens = self._tokens(question)
        if not tokens:
            raise Refusal(400, "the prompt has no tokens")
        if len(tokens) >= self._context:
            message = f"the conversation has {len(tokens)} tokens and the model reads {self._context}"
            raise Refusal(400, message, code="context_length_exceeded", param="messages")
        answers: list[Answering] = []
        for config in configs:
            answer = _Answer(self._request(name, tokens, config), len(tokens), config.logprobs or 0)
            with self._lock:
                self._answers.add(answer)
            self._pool.submit(self._run, answer)
            answers.append(answer)
        return answers

    def token_text(self, token: int) -> str:
        """As llama.cpp told it, or tells it now."""
        if token not in self._texts:
            self._texts[token] = self._call("POST", "/detokenize", {"tokens": [token]})["content"]
        return self._texts[token]

    def chat_template(self) -> str:
        """The file's own."""
        return self._template

    def publish(self, name: str, path: str) -> Voice:
        """Never: llama.cpp loads adapters when it starts."""
        raise Refusal(400, "llama.cpp loads adapters when it starts: put the file into --adapters and serve again")

    def withdraw(self, name: str) -> None:
        """Never."""
        raise Refusal(400, "llama.cpp keeps its adapters until it ends")

    def _tokens(self, question: Question) -> list[int]:
        if isinstance(question, np.ndarray):
            return question.tolist()
        if isinstance(question, Conversation):
            asked = {"messages": [_as_dict(message) for message in question.messages]}
            question = self._call("POST", "/apply-template", asked | _tools_of(question))["prompt"]
        asked = {"content": question, "add_special": True, "parse_special": True}
        return self._call("POST", "/tokenize", asked)["tokens"]

    def _request(self, name: str, tokens: list[int], config: Config) -> dict[str, Any]:
        """llama.cpp's words for ours."""
        same = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        asked: dict[str, Any] = {key: getattr(config, key) for key in same}
        asked |= {"prompt": tokens, "stream": True, "return_tokens": True, "samplers": list(_SAMPLERS)}
        asked |= {"n_predict": min(config.max_new_tokens, self._context - len(tokens)), "stop": list(config.stop)}
        asked |= {"repeat_penalty": config.repetition_penalty, "repeat_last_n": self._context}
        asked |= {"seed": -1 if config.seed is None else config.seed % (1 << 32), "cache_prompt": self._reuses_prompts}
        asked["logit_bias"] = [[token, bias] for token, bias in config.logit_bias.items()]
        asked["lora"] = [{"id": index, "scale": float(each == name)} for index, each in enumerate(self._names[1:])]
        if config.logprobs is not None:
            asked["n_probs"] = max(1, config.logprobs)
        if config.json_schema is not None:
            asked["json_schema"] = config.json_schema
        return asked

    def _run(self, answer: _Answer) -> None:
        connection = http.client.HTTPConnection(*self._address)
        try:
            connection.connect()
            answer.follow(connection, self._headers(), self._texts)
        except Exception as error:  # whoever waits for this answer must hear of it
            answer.give_up(error)
        finally:
            connection.close()
            with self._lock:
                self._answers.discard(answer)

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection(*self._address, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self._headers())
            reply = connection.getresponse()
            return _checked(reply.status, reply.read())
        finally:
            connection.close()


class _Answer:
    """`Answering` (engine.py) over one streamed request."""

    def __init__(self, request: dict[str, Any], prompt_tokens: int, told: int) -> None:
        self._request, self._prompt_tokens, self._told = request, prompt_tokens, told
        self._pieces: list[Piece] = []
        self._listeners: list[Callable[[Piece], None]] = []
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._cancelled = False
        self._reused = 0

    @property
    def answer(self) -> Answer:
        """What there is so far."""
        pieces = list(self._pieces)
        return Answer(
            tokens=[piece.token for piece in pieces if piece.token is not None],
            text="".join(piece.text for piece in pieces),
            finish=next((piece.finish for piece in pieces if piece.finish), ""),
            error=next((piece.error for piece in pieces if piece.error), None),
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused,
        )

    def listen(self, listener: Callable[[Piece], None]) -> None:
        """Every piece, those of the past first."""
        with self._lock:
            for piece in self._pieces:
                listener(piece)
            if not (self._pieces and self._pieces[-1].finish):
                self._listeners.append(listener)

    def cancel(self) -> None:
        """llama.cpp frees the slot of a client that hangs up."""
        self._cancelled = True
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # it was over already
                return

    def follow(self, connection: http.client.HTTPConnection, headers: dict[str, str], texts: dict[int, str]) -> None:
        """Ask, and tell the pieces as they come."""
        self._socket = connection.sock
        if self._cancelled:
            raise ConnectionAbortedError
        connection.request("POST", "/completion", json.dumps(self._request), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            _checked(reply.status, reply.read())
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise Refusal(500, str(chunk["error"].get("message", chunk["error"])))
            self._hear(chunk, texts)
            if chunk.get("stop"):
                return
        raise ConnectionAbortedError("llama.cpp ended in the middle of an answer")

    def give_up(self, error: Exception) -> None:
        """It ends early."""
        if not any(piece.finish for piece in self._pieces):
            if self._cancelled:
                self._tell(Piece(None, finish="cancelled"))
            else:
                self._tell(Piece(None, finish="error", error=f"llama.cpp: {error}"))

    def _hear(self, chunk: dict[str, Any], texts: dict[int, str]) -> None:
        """A chunk may have several tokens, where one alone was half a character; the last one carries the text."""
        tokens: list[int] = chunk.get("tokens") or []
        chances = chunk.get("completion_probabilities") or [None] * len(tokens)
        for place, (token, chance) in enumerate(zip(tokens, chances)):
            text = chunk["content"] if place == len(tokens) - 1 and not chunk["stop"] else ""
            self._tell(self._piece(token, text, chance, texts))
        if chunk["stop"]:
            finish = "length" if chunk.get("stop_type") == "limit" else "stop"
            self._reused = max(0, self._prompt_tokens - int(chunk.get("timings", {}).get("prompt_n", math.inf)))
            self._tell(Piece(None, chunk["content"], finish=finish))

    def _piece(self, token: int, text: str, chance: dict[str, Any] | None, texts: dict[int, str]) -> Piece:
        if chance is None:
            return Piece(token, text)
        top = chance["top_logprobs"]
        texts.update({each["id"]: each["token"] for each in (chance, *top)})
        likeliest = tuple((each["id"], each["logprob"]) for each in top[: self._told])
        return Piece(token, text, chance["logprob"], likeliest)

    def _tell(self, piece: Piece) -> None:
        with self._lock:
            self._pieces.append(piece)
            for listener in self._listeners:
                listener(piece)
            if piece.finish is not None:
                self._listeners.clear()


def _start(
    path: Path, adapters: list[Path], key: str, at_once: int, cache_tokens: int, threads: int | None, gpu_layers: int
) -> Any:
    """llama.cpp's server on a free loopback port, with everything off that reads files or shows what others ask."""
    import xllamacpp as library  # optional third-party package

    xllamacpp: Any = library  # it has no types
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.hostnames, settings.port, settings.api_keys = ["127.0.0.1"], 0, [key]
    settings.n_parallel, settings.n_ctx, settings.n_gpu_layers = at_once, cache_tokens, gpu_layers
    settings.n_threads_http = at_once + 4
    settings.ui = settings.endpoint_slots = settings.endpoint_metrics = False
    settings.offline, settings.warmup, settings.verbosity = True, False, 0
    if threads is not None:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    if adapters:
        loaded = []
        for adapter in adapters:
            described = xllamacpp.CommonAdapterLoraInfo()
            described.path, described.scale = str(adapter), 0.0
            loaded.append(described)
        settings.lora_adapters = loaded
        settings.cache_prompt, settings.cache_ram_mib = False, 0
    try:
        return xllamacpp.Server(settings)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"llama.cpp cannot load {path}: {error}") from error


def _checked(status: int, body: bytes) -> Any:
    content = json.loads(body)
    if status != 200:
        message = content.get("error", {}).get("message", body.decode("utf-8", "replace"))
        raise Refusal(400 if 400 <= status < 500 else 500, f"llama.cpp: {message}")
    return content


def _as_dict(message: Message) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "id": f"call_{index}",
                "type": "function",
                "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])},
            }
            for index, call in enumerate(message.tool_calls)
        ]
    return written


def _tools_of(question: Conversation) -> dict[str, Any]:
    return {"tools": list(question.tools)} if question.tools else {}
