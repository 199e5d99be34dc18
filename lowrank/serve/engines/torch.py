"""The engine of our own, on PyTorch: adapters of a bank, all in the same forward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lowrank.adapters.bank import Bank
from lowrank.data.chat.rendering import Renderer
from lowrank.errors import LowrankError
from lowrank.generate.adapter_registry import AdapterRegistry
from lowrank.generate.embedding import Pooling
from lowrank.generate.generator import Generator, GeneratorConfig
from lowrank.generate.request import ContextLengthExceeded, GenerationConfig
from lowrank.media.processor import processor_of
from lowrank.models.base import Base
from lowrank.notices import log_notice
from lowrank.pipelines.inference import folder_reader, open_inference_model, reward_model_notice
from lowrank.pipelines.media import attach_media_encoder
from lowrank.pipelines.resolve import is_gguf
from lowrank.records import Conversation
from lowrank.segments import Media
from lowrank.serve.adapter_cache import AdapterCache
from lowrank.serve.api.http_errors import ApiError
from lowrank.serve.api.prompt_tokens import tokens_and_media
from lowrank.serve.by_renderer import ReadsByRenderer
from lowrank.serve.engine import Load, PendingAnswer, PromptType, ServedModel
from lowrank.serve.engines import EngineKind, Notify, ServingOptions


class BankEngine(ReadsByRenderer):
    """`ServeEngine` (engine.py) on a `Generator`."""

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
        max_loras: int = 32,
        read: Callable[[Path], Renderer] | None = None,
    ) -> None:
        """`slots`: what may be asked already, the base among them; `folders`: where its adapters came from.

        `renderers`: of names that read a conversation otherwise than by `renderer`. Adapters a client publishes come
        from folders within `roots`; how those read one, `read` tells of their folder.
        """
        self.base = base
        self.renderer = renderer
        self._renderers = dict(renderers or {})
        self._folders = dict(folders or {})
        self._read_folder = read
        self._of_folders: dict[tuple[Path, int], Renderer] = {}
        self.generator = Generator(base, bank, config)
        published = AdapterRegistry(self.generator, slots)
        self.image_problem = self._attach_media_encoder()
        self.cache = AdapterCache(published, folders or {}, roots, max_loras=max_loras)

    def _attach_media_encoder(self) -> str | None:
        """Let the base be shown pictures, if it can; else why not. Before anybody is answered: it is tried out."""
        processor = processor_of(self.base.tokenizer)
        if processor is None or not processor.supports_images:
            return "the base reads text only"
        try:
            attach_media_encoder(self.base, "packed", log_notice, running=True, answering=True)
        except (LowrankError, ImportError) as error:
            return str(error)
        return self.generator.image_problem

    @property
    def vocabulary(self) -> int:
        """Rows of the head, padding included."""
        return self.base.model.get_output_embeddings().weight.shape[0]

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

    def served_models(self) -> list[ServedModel]:
        """The base first."""
        always = [ServedModel(name) for name in self.cache.always]
        parent = self.cache.always[0] if self.cache.always else None
        rest = [
            ServedModel(name, parent, entry.version, resident, entry.created)
            for name, (entry, resident) in self.cache.registered().items()
        ]
        return always + rest

    def load(self) -> Load:
        """At this moment."""
        return Load(self.generator.num_running, self.generator.num_waiting, self.generator.free_tokens)

    def submit(self, name: str, question: PromptType, configs: Sequence[GenerationConfig]) -> list[PendingAnswer]:
        """ApiError for an unknown name, a question that is too long or that the chat template refuses."""
        answers: list[PendingAnswer] = []
        try:
            renderer = self._renderer_of(name)
            token_L, media = self._read(question, renderer)
            for config in configs:
                answers.append(self.cache.submit(name, token_L, config, renderer.stop_tokens, media))
        except BaseException as error:
            for answer in answers:
                answer.cancel()
            if isinstance(error, ContextLengthExceeded):
                param = "messages" if isinstance(question, Conversation) else "prompt"
                raise ApiError(400, str(error), code="context_length_exceeded", param=param) from error
            if isinstance(error, LowrankError):
                raise ApiError(400, str(error)) from error
            raise
        return answers

    def embed(self, name: str, text: str | np.ndarray, pooling: Pooling) -> tuple[np.ndarray, int]:
        """Between two steps of the answers in progress."""
        token_L, _ = self._read(text, self.renderer, framed=True)
        try:
            return self.cache.embed(name, token_L, pooling), len(token_L)
        except ContextLengthExceeded as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="input") from error
        except LowrankError as error:
            raise ApiError(400, str(error), param="input") from error

    def token_text(self, token: int) -> str:
        """One token by itself, special or not."""
        return self.base.tokenizer.decode([token])

    def publish(self, name: str, path: str) -> ServedModel:
        """From a folder within the roots."""
        try:
            self.cache.publish(name, path)
        except LowrankError as error:
            raise ApiError(400, f"the adapter does not fit: {error}", param="path") from error
        return next(served for served in self.served_models() if served.name == name)

    def unpublish(self, name: str) -> None:
        """Its answers in progress go on to their end."""
        self.cache.unpublish(name)

    def _renderer_of(self, name: str) -> Renderer:
        """Of its folder, unless it is still the one it was made with."""
        known = self._renderers.get(name)
        entry, _ = self.cache.registered().get(name, (None, False))
        if (
            entry is None
            or self._read_folder is None
            or (known is not None and entry.folder == self._folders.get(name))
        ):
            return known or self.renderer
        key = entry.folder, entry.version
        if key not in self._of_folders:
            self._of_folders[key] = self._read_folder(entry.folder)
        return self._of_folders[key]

    def _read(
        self, question: PromptType, renderer: Renderer, *, framed: bool = False
    ) -> tuple[np.ndarray, Media | None]:
        tokenizer = self.base.tokenizer
        return tokens_and_media(question, renderer, tokenizer, self.vocabulary, self._reach, framed=framed)

    @property
    def _reach(self) -> int | None:
        """Tokens that a question may have at the very most."""
        table = self.generator.schedule.block_manager
        room = None if self.generator.notice is not None else table.capacity * table.page_size
        return min((each for each in (self.base.max_positions, room) if each is not None), default=None)


def _open(path: str, options: ServingOptions, notify: Notify) -> BankEngine:
    trained = open_inference_model(
        path, which=options.which, chat_template=options.chat_template, base=options.base, notify=notify
    )
    if reward_models := trained.reward_models_among(trained.names):
        notify(reward_model_notice(reward_models))
    served = BankEngine(
        trained.base,
        trained.bank,
        trained.renderer,
        trained.slots,
        renderers=trained.renderers,
        folders=trained.folders,
        roots=[*([Path(path)] if trained.folders else []), *options.adapters],
        config=GeneratorConfig(
            max_num_seqs=options.max_num_seqs, kv_cache_tokens=options.kv_cache_tokens, compile=options.compile
        ),
        max_loras=options.max_loras,
        read=folder_reader(trained.base.tokenizer, trained.renderer, trained.renderers, options.chat_template),
    )
    for folder in options.adapters:
        served.cache.register_all(folder)
    if served.generator.notice:
        notify(served.generator.notice)
    processor = processor_of(trained.base.tokenizer)
    if processor is not None and processor.supports_images and served.image_problem is not None:
        notify(f"pictures are refused here: {served.image_problem}")
    return served


ENGINE = EngineKind(
    open=_open,
    reads=lambda path: not is_gguf(path),
    takes="folders and hub names",
    compiles=True,
)
