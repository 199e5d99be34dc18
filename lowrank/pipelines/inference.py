"""Inference: a run folder, an adapter folder or a plain model, ready to answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import lowrank.models.loading.pretrained as loading
from lowrank.adapters.bank import Bank
from lowrank.batches import BASE_SLOT
from lowrank.checkpoints.base_tensors import on_model
from lowrank.checkpoints.own_tokens import learn_tokens, own_tokens
from lowrank.checkpoints.peft_layout import load_adapter, read_adapter_header
from lowrank.checkpoints.value_head import FILE as VALUE_HEAD_FILE
from lowrank.checkpoints.value_head import is_critic, read_value_head
from lowrank.data.chat.placeholders import media_in
from lowrank.data.chat.rendering import Renderer
from lowrank.data.config import DataConfig
from lowrank.errors import DataError, ModelError, did_you_mean
from lowrank.evaluate.predict import AnsweringModels
from lowrank.evaluate.reward import rewards
from lowrank.generate.answer_text import AnswerText
from lowrank.generate.compiled_decoding import CompiledDecoding
from lowrank.generate.request import Answer, TokenChunk
from lowrank.generate.sampler import GenerationConfig, Prompt, answer_all
from lowrank.models.base import Base
from lowrank.notices import log_notice
from lowrank.pipelines.adapter_on_base import refuse_before_loading
from lowrank.pipelines.artifacts import BASE_NAME, Adapters, ModelArtifacts, data_of_adapter, find_artifacts
from lowrank.pipelines.media import attach_media_encoder
from lowrank.records import Conversation, Picture, Rated
from lowrank.third_party import code_allowed


@dataclass(frozen=True)
class RenderedPrompt:
    """A conversation as a model reads it. `chat_template`: its Jinja source; `ends`: the tokens that end an answer."""

    chat_template: str
    prompt: str
    ends: tuple[str, ...]


@dataclass
class InferenceModel:
    """A base with adapters, by name. The name `base`, which always exists, is the base without adapter."""

    base: Base
    bank: Bank
    renderer: Renderer
    """The renderer of the base, and of every model that has no other in `renderers`."""
    slots: dict[str, int] = field(default_factory=lambda: {BASE_NAME: BASE_SLOT})
    value_heads: dict[str, torch.Tensor] = field(default_factory=dict)
    """The value heads, (D), of the reward models."""
    folders: dict[str, Path] = field(default_factory=dict)
    """The folders that the adapters were loaded from."""
    renderers: dict[str, Renderer] = field(default_factory=dict)
    """Renderers of adapters that were trained with other settings than the base's; those with the same settings share
    one."""
    compiled: CompiledDecoding | None = None
    """The base's compiled decoder layers, used for all answers; None: not compiled."""

    def slot(self, name: str) -> int:
        """Return the slot of a model. ModelError for an unknown name."""
        refuse_unknown(name, self.slots)
        return self.slots[name]

    def renderer_of(self, name: str) -> Renderer:
        """Return the renderer of a model, which reads conversations as in its training."""
        return self.renderers.get(name, self.renderer)

    def answering(
        self, names: Iterable[str], conversations: Iterable[Conversation], notify: Callable[[str], None] = log_notice
    ) -> AnsweringModels:
        """Return these models ready to answer `conversations`. ModelError for an unknown name, and for a base that
        cannot read the pictures in them."""
        self._attach_media_encoder(conversations, notify)
        slots = {name: self.slot(name) for name in names}
        renderers = {name: self.renderer_of(name) for name in slots}
        return AnsweringModels(self.base, self.bank, slots, renderers, self.compiled)

    def _attach_media_encoder(self, conversations: Iterable[Conversation], notify: Callable[[str], None]) -> None:
        """Attach the media encoder if the conversations have pictures. ModelError if the base cannot read them."""
        if any(isinstance(each, Picture) for conversation in conversations for each in media_in(conversation)):
            attach_media_encoder(self.base, "packed", notify, running=True, answering=True)

    def reward_models_among(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that are reward models."""
        return [name for name in names if name in self.value_heads]

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return list(self.slots)

    def render_prompt(self, name: str, conversation: Conversation) -> RenderedPrompt:
        """Return a conversation as the model reads it before its answer."""
        self.slot(name)
        renderer = self.renderer_of(name)
        prompt = self.base.tokenizer.decode(renderer.prompt_segment(conversation).token_L)
        ends = self.base.tokenizer.convert_ids_to_tokens(sorted(renderer.stop_tokens))
        return RenderedPrompt(renderer.chat_template, prompt, tuple(ends))

    def rewards(self, conversations: Sequence[tuple[str, Conversation]]) -> list[float]:
        """Return the reward of each `(reward model, conversation that ends in an answer)`; higher is better.

        ModelError for a model that is not a reward model, DataError for a conversation longer than the model reads.
        """
        scored = []
        for name, conversation in conversations:
            slot = self.slot(name)
            if name not in self.value_heads:
                raise ModelError(f"{name!r} is no reward model: no {VALUE_HEAD_FILE} of one is beside it")
            rendering = self.renderer_of(name).render(Rated(conversation, desirable=True))
            if rendering.problem or rendering.truncated_tokens:
                raise DataError(rendering.problem or "the conversation is longer than data.max_length")
            scored.append((slot, self.value_heads[name], rendering.segments[0]))
        return rewards(self.base, self.bank, scored)

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Return a digest of each model's adapter, "base" for the base without adapter."""
        return {name: _digest(self.bank, self.slot(name)) for name in names}

    def answer(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: GenerationConfig,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """Return the next answer of each `(model, conversation)`, in order. `on_text` is called with each text chunk
        (single conversation only).

        A model whose logits are NaN has an empty answer; `answers` returns the error.
        """
        return [answer.text for answer in self.answers(conversations, config, on_text=on_text)]

    def answers(
        self,
        conversations: Sequence[tuple[str, Conversation]],
        config: GenerationConfig,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> list[Answer]:
        """Return answers as `answer` does, with their tokens and, where there is none, the error."""
        prompts = [self._prompt(name, each) for name, each in conversations]
        virtual = max(self.bank.num_virtual(prompt.slot) for prompt in prompts)
        config = self._within_reach(virtual + max(len(prompt.token_L) for prompt in prompts), config)

        texts = [AnswerText(self.renderer_of(name)) for name, _ in conversations]
        alike: dict[tuple[frozenset[int], tuple[str, ...]], list[int]] = {}
        for index, (name, _) in enumerate(conversations):
            alike.setdefault((self.renderer_of(name).stop_tokens, texts[index].marks), []).append(index)
        found: dict[int, Answer] = {}
        for (stop_tokens, marks), members in alike.items():

            def on_chunk(place: int, chunk: TokenChunk, members: Sequence[int] = members) -> None:
                text = texts[members[place]].add(chunk)
                if on_text is not None and text:
                    on_text(text)

            group = [prompts[index] for index in members]
            drawn = config.model_copy(update={"preserved_tokens": marks})
            answers = answer_all(
                self.base,
                self.bank,
                group,
                drawn,
                stop_tokens=stop_tokens,
                on_chunk=on_chunk,
                compiled=self.compiled,
            )
            found.update({index: texts[index].of(answer) for index, answer in zip(members, answers)})
        return [found[index] for index in range(len(conversations))]

    def _prompt(self, name: str, conversation: Conversation) -> Prompt:
        self._attach_media_encoder([conversation], log_notice)
        segment = self.renderer_of(name).prompt_segment(conversation)
        return Prompt(segment.token_L, self.slot(name), segment.media)

    def _within_reach(self, length: int, config: GenerationConfig) -> GenerationConfig:
        """Limit `max_new_tokens` to the model's context. ModelError if the conversation alone fills it."""
        reach = self.base.max_positions
        if not reach or length + config.max_new_tokens <= reach:
            return config
        if length >= reach:
            raise ModelError(
                f"the conversation has {length} tokens and the model's maximum context length is {reach}; shorten "
                "it (in `lowrank chat`: /undo, /reset)"
            )
        return config.model_copy(update={"max_new_tokens": reach - length})


def refuse_unknown(name: str, names: Iterable[str]) -> None:
    """ModelError for a name that is not among those of the models."""
    known = list(names)
    if name not in known:
        raise ModelError(f"there is no adapter {name!r} here{did_you_mean(name, known)}")


def open_inference_model(
    path: str,
    *,
    which: str = "best",
    adapters: Adapters = (),
    answering: Sequence[str] = (),
    chat_template: str | None = None,
    base: str | None = None,
    compile: bool = False,
    notify: Callable[[str], None] = log_notice,
    allow_code: bool = False,
) -> InferenceModel:
    """Load the model that `path` names: a run folder (all its jobs), one of its checkpoints, an adapter folder, or a
    model.

    `which`: a run's `best` or `last` adapters. `adapters`: more of them on the same base. `answering`: names that must
    be among the models, which is checked before any is loaded. `chat_template`: a built-in one or a file, instead of
    the run's or the tokenizer's. `base`: where the adapters' base is now. `compile`: answer through compiled layers.
    `allow_code`: the model's own code, or an adapter's, may run. Raises ModelError, ConfigError.
    """
    with code_allowed(allow_code):
        found = find_artifacts(
            path, which=which, adapters=adapters, chat_template=chat_template, base=base, notify=notify
        )
        for name in answering:
            refuse_unknown(name, found.names)
        loaded = _load_found(found, notify)
    if compile:
        loaded.compiled = CompiledDecoding(loaded.base, loaded.bank, notify)
    return loaded


def _load_found(found: ModelArtifacts, notify: Callable[[str], None]) -> InferenceModel:
    tokenizer = loading.load_tokenizer(found.model)
    for folder in found.adapters.values():
        refuse_before_loading(read_adapter_header(folder), found.model)
    for notice in learn_tokens(tokenizer, found.adapters):
        notify(notice)
    base = loading.load(found.model, tokenizer=tokenizer, notify=notify)
    renderers = renderers_of(found, tokenizer, base.max_positions)
    trained = InferenceModel(base, Bank(base), renderers.pop(BASE_NAME), renderers=renderers)
    if found.trained_base is not None:
        name, folder = found.trained_base
        trained.slots = {name: BASE_SLOT}
        _attach_value_head(trained, name, folder)
    elif Path(found.model.path).is_dir():  # a reward model that was exported whole
        _attach_value_head(trained, BASE_NAME, Path(found.model.path))
    for name, folder in found.adapters.items():
        saved = on_model(load_adapter(folder), base.model)
        for note in saved.notes:
            notify(f"{name}: {note}")
        slot = trained.bank.add(saved.config, seed=0)
        trained.bank.load(slot, saved.tensors)
        trained.slots[name] = slot
        trained.folders[name] = folder
        _attach_value_head(trained, name, folder)
    return trained


def reward_model_notice(names: Sequence[str]) -> str:
    """Return a notice for reward models that are used to generate text."""
    what = "are reward models" if len(names) > 1 else "is a reward model"
    return (
        f"{', '.join(names)} {what}, trained to score answers and not to write them; get rewards in Python: "
        "lowrank.load(...).rewards(...)"
    )


def renderers_of(found: ModelArtifacts, tokenizer: Any, reach: int | None = None) -> dict[str, Renderer]:
    """Return the renderers of the base ("base") and of each adapter; those with the same settings share one. `reach`:
    the base's context length."""
    made: dict[str, Renderer] = {}
    settings = {BASE_NAME: found.data, **{name: found.data_of.get(name, found.data) for name in found.adapters}}
    settings = {name: data.within(reach) for name, data in settings.items()}
    keys = {name: _key(data) for name, data in settings.items()}
    return {name: made.setdefault(keys[name], Renderer(tokenizer, data)) for name, data in settings.items()}


def folder_reader(
    tokenizer: Any, base: Renderer, renderers: Mapping[str, Renderer], chat_template: str | None
) -> Callable[[Path], Renderer]:
    """Return a function that makes the renderer of an adapter which is loaded later from a folder: as in its training,
    or by the template beside it; the base's if one `chat_template` is set for all."""
    made = {_key(each.config): each for each in (*renderers.values(), base)}

    def read(folder: Path) -> Renderer:
        if unknown := own_tokens(folder, tokenizer):
            raise ModelError(
                f"{folder}: its tokenizer has tokens of its own ({', '.join(unknown)[:200]}), which this server does "
                "not know; start it with this adapter"
            )
        if chat_template is not None:
            return base
        data = data_of_adapter(folder)
        if data == DataConfig():
            return base
        return made.setdefault(_key(data), Renderer(tokenizer, data))

    return read


def _key(data: DataConfig) -> str:
    return data.model_dump_json(exclude={"train", "eval"})


def _attach_value_head(trained: InferenceModel, name: str, folder: Path) -> None:
    value_D = read_value_head(folder)
    if value_D is not None and not is_critic(folder):
        trained.value_heads[name] = value_D


def _digest(bank: Bank, slot: int) -> str:
    if slot == BASE_SLOT:
        return BASE_NAME
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(bank.parameters(slot).items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
