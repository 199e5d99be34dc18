"""The engine for GGUF files: llama.cpp's own server, in this process, through the wheel xllamacpp.

It listens on a free loopback port behind a key of its own and is asked for tokens only; templates, limits and
OpenAI's forms stay ours. LoRA adapters are GGUF files too and are loaded when it starts; each request says which one
counts. Where there are any, llama.cpp's prompt cache is off: it does not know of adapters and would hand the keys of
one to another (llama.cpp #26207).
"""

from __future__ import annotations

import http.client
import json
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.data.chat.template import ChatTemplate, Rendered
from lowrank.data.chat.template_shape import with_call_ids
from lowrank.data.templates import source_of
from lowrank.errors import LowrankError, ModelError
from lowrank.generate.embedding import Pooling
from lowrank.generate.request import GenerationConfig
from lowrank.pipelines.resolve import is_gguf
from lowrank.records import Conversation
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.prompt_tokens import refuse_too_long, too_long
from lowrank.serve.engine import ChatPrompt, Load, PendingAnswer, PromptType, ServedModel
from lowrank.serve.engines import EngineKind, Notify, ServingOptions, install
from lowrank.serve.folders import unknown_model
from lowrank.serve.llama_cpp_engine.answer import LlamaCppAnswer, checked
from lowrank.serve.llama_cpp_engine.file_faults import check_files
from lowrank.serve.llama_cpp_engine.prompt import frame_of, read_tokens, tokens_of

BASE = "base"
_SAMPLERS = ("penalties", "temperature", "top_k", "top_p", "min_p")
"""In the order of generate/sampling.py."""


class LlamaCppEngine:
    """`ServeEngine` (engine.py) on one file. Raises ModelError if it cannot be loaded."""

    name = "llama.cpp"
    image_problem: str | None = (
        "a GGUF file is read as text here; for pictures serve the model's folder, or run llama-server with --mmproj"
    )
    """See `ImageEngine`."""

    def __init__(
        self,
        path: Path,
        *,
        adapters: Mapping[str, Path] | None = None,
        max_num_seqs: int = 8,
        kv_cache_tokens: int = 65536,
        chat_template: str | None = None,
        threads: int | None = None,
        gpu_layers: int = -1,
    ) -> None:
        """`kv_cache_tokens` are shared by the `max_num_seqs` answers that are made at the same time.

        `chat_template`: a built-in one or a .jinja file, instead of the file's own.
        """
        if ENGINE.missing:
            raise ModelError(f"answering from a GGUF file needs llama.cpp: {install(ENGINE)}")
        self._names = [BASE, *(adapters or {})]
        files = list((adapters or {}).values())
        check_files(path, files)
        self._key = secrets.token_urlsafe(16)
        self._reuses_prompts = not files
        template = "" if chat_template is None else source_of(chat_template)
        self._server: Any = _start(path, files, self._key, max_num_seqs, kv_cache_tokens, template, threads, gpu_layers)
        host, _, port = self._server.listening_address.removeprefix("http://").rpartition(":")
        self._address = (host, int(port))
        described = self._call("GET", "/props")
        self._template = template or str(described.get("chat_template", ""))
        self.end_of_turn = str(described.get("eos_token", ""))
        """The file's EOS. llama.cpp stops at its other end tokens (EOT and their kind) too, and does not tell them."""
        self._context = int(described["default_generation_settings"]["n_ctx"])
        self.vocabulary = int(self._call("GET", "/v1/models")["data"][0]["meta"]["n_vocab"])
        self._known = read_tokens(path)
        self._frame = frame_of(self._tokenize, lambda text: self._tokenize(text, framed=True))
        self._texts: dict[int, str] = {}
        self._max_num_seqs = max_num_seqs
        self._answers: set[LlamaCppAnswer] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_num_seqs, thread_name_prefix="lowrank-llama")

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

    def served_models(self) -> list[ServedModel]:
        """The file itself first."""
        return [ServedModel(BASE), *(ServedModel(name, BASE, 1) for name in self._names[1:])]

    def load(self) -> Load:
        """As many as llama.cpp has slots run; others wait."""
        with self._lock:
            return Load(min(len(self._answers), self._max_num_seqs), max(0, len(self._answers) - self._max_num_seqs))

    def submit(self, name: str, question: PromptType, configs: Sequence[GenerationConfig]) -> list[PendingAnswer]:
        """ApiError for an unknown name, a question that is too long or that the chat template refuses."""
        if name not in self._names:
            raise unknown_model(name, self._names)
        refuse_too_long(question, self._context, lambda text: len(self._tokenize(text)))
        tokens = self._tokens(question)
        if not tokens:
            raise ApiError(400, "the prompt has no tokens")
        if len(tokens) >= self._context:
            raise too_long(str(len(tokens)), self._context, question)
        answers: list[PendingAnswer] = []
        for config in configs:
            answer = LlamaCppAnswer(self._request(name, tokens, config), len(tokens), config.logprobs or 0)
            with self._lock:
                self._answers.add(answer)
            self._pool.submit(self._run, answer)
            answers.append(answer)
        return answers

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """Never: llama.cpp's server gives either answers or embeddings."""
        raise ApiError(400, "there are no embeddings of a GGUF file here; serve the model's folder (--engine torch)")

    def token_text(self, token: int) -> str:
        """As llama.cpp told it, or tells it now."""
        if token not in self._texts:
            self._texts[token] = self._call("POST", "/detokenize", {"tokens": [token]})["content"]
        return self._texts[token]

    def chat_template(self, name: str) -> str:
        """The file's own, or the one that was chosen; all models have the same."""
        return self._template

    def chat_variables(self, name: str) -> Mapping[str, Any]:
        """None: a file has a template, and no settings."""
        return {}

    def as_read(self, question: Conversation) -> str:
        """A conversation through the chat template, up to where an answer begins."""
        return self._rendered(question).text

    def _rendered(self, question: Conversation) -> Rendered:
        """As the torch engine renders it: the file's template is a program too, and what a client types is text."""
        if not self._template:
            raise ApiError(400, "the file has no chat template; start with --chat-template NAME")
        variables = dict(question.variables) if isinstance(question, ChatPrompt) else {}
        messages = with_call_ids(question.messages, "call{index:05}")  # nine characters, as Mistral's templates want
        try:
            template = ChatTemplate(self._template, self._known, {})
            return template.render(messages, question.tools, generation_prompt=True, variables=variables)
        except LowrankError as error:
            raise ApiError(400, str(error), param="messages") from error

    def publish(self, name: str, path: str) -> ServedModel:
        """Never: llama.cpp loads adapters when it starts."""
        raise ApiError(400, "llama.cpp loads adapters when it starts: put the file into --adapters and serve again")

    def unpublish(self, name: str) -> None:
        """Never."""
        raise ApiError(400, "llama.cpp keeps its adapters until it ends")

    def _tokens(self, question: PromptType) -> list[int]:
        if isinstance(question, np.ndarray):
            return question.tolist()
        if isinstance(question, Conversation):
            return tokens_of(self._rendered(question), self._frame, self._known, self._tokenize)
        tokens = self._tokenize(question)
        return tokens if tokens[: len(self._frame)] == self._frame else [*self._frame, *tokens]

    def _tokenize(self, text: str, control: bool = True, *, framed: bool = False) -> list[int]:
        payload = {"content": text, "add_special": framed, "parse_special": control}
        return self._call("POST", "/tokenize", payload)["tokens"]

    def _request(self, name: str, tokens: list[int], config: GenerationConfig) -> dict[str, Any]:
        """llama.cpp's words for ours."""
        same = ("temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty")
        payload: dict[str, Any] = {key: getattr(config, key) for key in same}
        payload |= {"prompt": tokens, "stream": True, "return_tokens": True, "samplers": list(_SAMPLERS)}
        payload |= {"n_predict": min(config.max_new_tokens, self._context - len(tokens)), "stop": list(config.stop)}
        payload |= {"repeat_penalty": config.repetition_penalty, "repeat_last_n": self._context}
        payload |= {
            "seed": -1 if config.seed is None else config.seed % (1 << 32),
            "cache_prompt": self._reuses_prompts,
        }
        if config.preserved_tokens:
            payload["preserved_tokens"] = list(config.preserved_tokens)
        payload["logit_bias"] = [[token, bias] for token, bias in config.logit_bias.items()]
        payload["lora"] = [{"id": index, "scale": float(each == name)} for index, each in enumerate(self._names[1:])]
        if config.logprobs is not None:
            payload["n_probs"] = max(1, config.logprobs)
        if config.json_schema is not None:
            payload["json_schema"] = config.json_schema
        if config.grammar is not None:  # the wheel has llguidance built in
            payload["grammar"] = "%llguidance {}\n" + config.grammar
        return payload

    def _run(self, answer: LlamaCppAnswer) -> None:
        connection = http.client.HTTPConnection(*self._address)
        try:
            connection.connect()
            answer.follow(connection, self._headers(), self._texts)
        except Exception as error:  # whoever waits for this answer must get it
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
            return checked(reply.status, reply.read())
        finally:
            connection.close()


def _start(
    path: Path,
    adapters: list[Path],
    key: str,
    max_num_seqs: int,
    kv_cache_tokens: int,
    chat_template: str,
    threads: int | None,
    gpu_layers: int,
) -> Any:
    """llama.cpp's server on a free loopback port, with everything off that reads files or shows what others ask."""
    import xllamacpp as library  # optional third-party package

    xllamacpp: Any = library  # it has no types
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.hostnames, settings.port, settings.api_keys = ["127.0.0.1"], 0, [key]
    settings.n_parallel, settings.n_ctx, settings.n_gpu_layers = max_num_seqs, kv_cache_tokens, gpu_layers
    settings.kv_unified = True  # else each slot has its own share of the cache, and reads no further
    settings.chat_template = chat_template
    settings.n_threads_http = max_num_seqs + 4
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
        raise ModelError(
            f"llama.cpp cannot load {path}{' with its adapters' if adapters else ''}: {error}\n"
            f"  the headers are sound, so look at memory (--kv-cache-tokens {kv_cache_tokens} takes much of it), or at "
            "whether this llama.cpp is older than the model"
        ) from error


def _open(path: str, options: ServingOptions, notify: Notify) -> LlamaCppEngine:
    found = {file.stem: file for folder in options.adapters for file in sorted(folder.glob("*.gguf"))}
    return LlamaCppEngine(
        Path(path),
        adapters=found,
        max_num_seqs=options.max_num_seqs,
        kv_cache_tokens=options.kv_cache_tokens,
        chat_template=options.chat_template,
    )


def _check(path: str, options: ServingOptions) -> list[str]:
    problems = []
    if options.which == "last":
        problems.append(f"--last chooses among the adapters of a run, and {path} is a single model; leave it out")
    if options.base is not None:
        problems.append(f"--base: {path} is a model by itself, not adapters on one; leave it out")
    return problems


ENGINE = EngineKind(
    open=_open,
    reads=is_gguf,
    takes="GGUF files",
    check=_check,
    packages=("xllamacpp",),
    extra="gguf",
)
