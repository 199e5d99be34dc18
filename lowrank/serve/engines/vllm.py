"""The engine for NVIDIA GPUs with vLLM: one base, adapters as vLLM's `LoRARequest`s.

Needs `pip install 'lowrank-llm[serve,vllm]'`.

Written from the source of vLLM 0.32.0, which goes with our torch (vllm/v1/engine/async_llm.py, vllm/lora/request.py;
0.33.0 is the same here). It has not been run on a GPU yet; its parts that need none are tested.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowrank.checkpoints.adapter_folder import adapters_in
from lowrank.checkpoints.peft_layout import read_adapter_header
from lowrank.data.chat.rendering import Renderer
from lowrank.errors import LowrankError, ModelError, raise_all
from lowrank.generate.detokenizer import hidden_tokens
from lowrank.generate.embedding import Pooling
from lowrank.generate.request import GenerationConfig
from lowrank.models.layer_wrappers import refuse_wrapped
from lowrank.models.loading.pretrained import load_tokenizer
from lowrank.notices import log_notice
from lowrank.pipelines.artifacts import ModelArtifacts, find_artifacts
from lowrank.pipelines.inference import BASE_NAME, folder_reader, renderers_of
from lowrank.pipelines.resolve import is_gguf
from lowrank.planning.simulation import read_config
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.prompt_tokens import tokens_of, too_long
from lowrank.serve.by_renderer import ReadsByRenderer
from lowrank.serve.engine import Load, PendingAnswer, PromptType, ServedModel
from lowrank.serve.engines import EngineKind, Notify, ServingOptions
from lowrank.serve.folders import adapter_within, unknown_model
from lowrank.serve.vllm_engine.adapters import AdapterVersion, VllmAdapters, refuse_own_rows
from lowrank.serve.vllm_engine.answer import VllmAnswer
from lowrank.serve.vllm_engine.params import rank_for, sampling_options, token_chunks
from lowrank.serve.vllm_engine.start import Vllm, open_vllm


class VllmEngine(ReadsByRenderer):
    """`ServeEngine` (engine.py) on vLLM, which has an event loop in a thread of its own here."""

    name = "vllm"

    def __init__(
        self,
        vllm: Vllm,
        tokenizer: Any,
        renderers: Mapping[str, Renderer],
        adapters: Mapping[str, Path],
        *,
        roots: Sequence[Path] = (),
        max_num_seqs: int = 64,
        read: Callable[[Path], Renderer] | None = None,
        check: Callable[[Path], None] = lambda folder: None,
        notify: Callable[[str], None] = log_notice,
    ) -> None:
        """`renderers`: how the base (`base`) and each adapter read a conversation; the base's for all others, but that
        `read` tells of the folder of one that is published. `check` raises ModelError for an adapter's folder that vLLM
        would load without part of it. `notify` is called with adapters that are left out."""
        self._vllm, self._tokenizer, self._renderers, self._read = vllm, tokenizer, dict(renderers), read
        self._roots = tuple(root.resolve() for root in roots)
        self._max_num_seqs = max_num_seqs
        self._reach = int(vllm.llm.model_config.max_model_len)
        self._ids = itertools.count(1)
        self._pending: set[VllmAnswer] = set()
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lowrank-vllm", daemon=True)
        self._thread.start()
        self._watch = vllm.watch
        self._adapters = VllmAdapters(vllm, self._loop, check)
        try:
            self._adapters.add_all(adapters, notify)
        except ApiError:
            self.close()
            raise

    @property
    def vocabulary(self) -> int:
        """The model's, padding included."""
        return int(self._vllm.llm.model_config.get_vocab_size())

    def start(self) -> None:
        """It runs since it was made."""

    def close(self) -> None:
        """Whatever is being answered ends as cancelled."""
        with self._lock:
            pending = list(self._pending)
        for answer in pending:
            answer.cancel()
        for answer in pending:
            answer.over.wait(10)
        self._vllm.llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        if not self._thread.is_alive():
            self._loop.close()
        self._adapters.close()
        if self._watch is not None and self._watch.stdin is not None:
            self._watch.stdin.close()
            self._watch.wait(10)

    @property
    def alive(self) -> bool:
        """Its process runs and has not failed."""
        return self._thread.is_alive() and not self._vllm.llm.errored

    def served_models(self) -> list[ServedModel]:
        """The base first."""
        versions = self._adapters.versions()
        return [
            ServedModel(BASE_NAME),
            *(ServedModel(each.name, BASE_NAME, each.number, True, each.created) for each in versions),
        ]

    def load(self) -> Load:
        """As many as vLLM answers at once run; others wait."""
        with self._lock:
            return Load(min(len(self._pending), self._max_num_seqs), max(0, len(self._pending) - self._max_num_seqs))

    def submit(self, name: str, question: PromptType, configs: Sequence[GenerationConfig]) -> list[PendingAnswer]:
        """ApiError for an unknown name, a question that is too long or that the chat template refuses."""
        if name != BASE_NAME and name not in self._adapters:
            raise self._unknown(name)
        renderer = self._renderer_of(name)
        try:
            token_L = tokens_of(question, renderer, self._tokenizer, self.vocabulary, self._reach)
        except LowrankError as error:
            raise ApiError(400, str(error)) from error
        if not len(token_L):
            raise ApiError(400, "the prompt has no tokens")
        if len(token_L) >= self._reach:
            raise too_long(str(len(token_L)), self._reach, question)
        prompt = {"prompt_token_ids": token_L.tolist()}
        most = self._reach - len(token_L)
        samplings = [self._sampling(config, renderer.stop_tokens, most) for config in configs]
        answers: list[PendingAnswer] = []
        for config, sampling in zip(configs, samplings):
            version = None if name == BASE_NAME else self._adapters.use(name)
            if name != BASE_NAME and version is None:  # taken away since
                raise self._unknown(name)
            answer = VllmAnswer(self._loop, len(token_L))
            with self._lock:
                self._pending.add(answer)
            answers.append(answer)
            work = self._run(answer, prompt, sampling, version, config)
            self._loop.call_soon_threadsafe(answer.begin, work, partial(self._end, answer, version))
        return answers

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """Never: vLLM loads a model either to answer or to embed."""
        raise ApiError(400, "there are no embeddings with --engine vllm; serve with --engine torch")

    def token_text(self, token: int) -> str:
        """One token by itself, special or not."""
        return self._tokenizer.decode([token])

    def publish(self, name: str, path: str) -> ServedModel:
        """From a folder within the roots."""
        if name == BASE_NAME:
            raise ApiError(400, f"{name!r} is the base and cannot be replaced", param="name")
        folder = adapter_within(self._roots, path)
        self._adapters.add(name, folder)
        if self._read is not None:
            self._renderers[name] = self._read(folder)
        return next(served for served in self.served_models() if served.name == name)

    def unpublish(self, name: str) -> None:
        """Its answers in progress go on to their end."""
        if name == BASE_NAME:
            raise ApiError(400, f"{name!r} is the base and cannot be taken away", param="name")
        if not self._adapters.remove(name):
            raise self._unknown(name)

    def _sampling(self, config: GenerationConfig, stop_tokens: frozenset[int], most: int) -> Any:
        options = sampling_options(config, stop_tokens, min(config.max_new_tokens, most))
        try:
            if config.json_schema is not None or config.grammar is not None:
                options["structured_outputs"] = self._vllm.form(config)
            if self._hidden(config):
                options["skip_special_tokens"] = False
            return self._vllm.sampling(**options)
        except Exception as error:  # vLLM's own kinds of error are no ValueErrors; what is refused here is the request
            raise ApiError(400, f"vLLM: {error}") from error

    def _hidden(self, config: GenerationConfig) -> Sequence[str]:
        """Control tokens to take out of a text that has others, which vLLM shows all or none of."""
        hidden = hidden_tokens(self._tokenizer, config.preserved_tokens) if config.preserved_tokens else None
        return list((hidden or {}).values())

    def _renderer_of(self, name: str) -> Renderer:
        return self._renderers.get(name, self._renderers[BASE_NAME])

    def _unknown(self, name: str) -> ApiError:
        return unknown_model(name, [served.name for served in self.served_models()])

    async def _run(
        self, answer: VllmAnswer, prompt: Any, sampling: Any, version: AdapterVersion | None, config: GenerationConfig
    ) -> None:
        """vLLM frees what it holds for a request when this task is cancelled."""
        request = None if version is None else version.request
        hidden = self._hidden(config)
        outputs = self._vllm.llm.generate(prompt, sampling, f"lowrank-{next(self._ids)}", lora_request=request)
        async for output in outputs:
            answer.cached = output.num_cached_tokens or answer.cached
            for chunk in token_chunks(output.outputs[0], config.logprobs or 0):
                text = chunk.text
                for control in hidden:
                    text = text.replace(control, "")
                answer.stream.push(replace(chunk, text=text))

    def _end(self, answer: VllmAnswer, version: AdapterVersion | None) -> None:
        """Its task is over, however it ended."""
        with self._lock:
            self._pending.discard(answer)
        if version is not None:
            self._adapters.leave(version)


def _open(path: str, options: ServingOptions, notify: Notify) -> VllmEngine:
    """The same paths as for torch, but the base is vLLM's."""
    found = find_artifacts(
        path, which=options.which, chat_template=options.chat_template, base=options.base, notify=notify
    )
    refuse_wrapped(read_config(found.model), "vLLM has no such layers")
    if found.model.storage.type != "dense":
        notify(f"vLLM answers on the base in 16 bit; the adapters were trained on {found.model.storage.type}")
    folders, ranks = _lora_folders(found, options, notify)
    vllm = open_vllm(
        found.model, max_num_seqs=options.max_num_seqs, max_loras=options.max_loras, max_rank=rank_for(ranks)
    )
    tokenizer = load_tokenizer(found.model)
    renderers = renderers_of(found, tokenizer)
    read = folder_reader(tokenizer, renderers[BASE_NAME], renderers, options.chat_template)
    renderers |= {name: read(place) for name, place in folders.items() if name not in found.adapters}
    try:
        return VllmEngine(
            vllm,
            tokenizer,
            renderers,
            folders,
            roots=[*([Path(path)] if found.adapters else []), *options.adapters],
            max_num_seqs=options.max_num_seqs,
            read=read,
            notify=notify,
            check=lambda folder: refuse_own_rows(folder, found.model),
        )
    except ApiError as refusal:
        raise ModelError(refusal.message) from refusal


def _lora_folders(
    found: ModelArtifacts, options: ServingOptions, notify: Notify
) -> tuple[dict[str, Path], Sequence[int]]:
    """The adapters that vLLM can run, and the ranks in them. ModelError where there are adapters and none is LoRA."""
    folders = {name: place for each in options.adapters for name, place in adapters_in(each).items()}
    folders |= {**found.adapters}
    loaded = {name: read_adapter_header(place) for name, place in folders.items()}
    others = {name: each.config.title for name, each in loaded.items() if each.config.unmergeable is not None}
    if len(others) == len(loaded):
        unknown = [f"{name}: {title}" for name, title in others.items()]
        raise_all(ModelError, "vLLM runs LoRA alone; serve these with --engine torch", unknown)
    for name, title in others.items():
        notify(f"{name} is not served: vLLM runs LoRA alone, and it is {title} (--engine torch)")
    ranks = [rank for name in loaded.keys() - others for rank, _ in loaded[name].targets.values()]
    return {name: place for name, place in folders.items() if name not in others}, ranks


ENGINE = EngineKind(
    open=_open,
    reads=lambda path: not is_gguf(path),
    takes="folders and hub names",
    packages=("vllm",),
    extra="vllm",
    named_only=True,
)
